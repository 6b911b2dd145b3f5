"""Objectives against their formulas, and masks that depend on the sample alone."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import UserError
from core.registry import build
from model.init import initialise
from model.output import ModelOutput
from model.zoo import build_model
from tests.training.helpers import LANGUAGE, VISION, Letters, language_data, vision_data
from training.objectives.base import METRIC
from training.objectives.causal_lm import CausalLM
from training.objectives.choose import choose_objective, default_objective
from training.objectives.image_classification import ImageClassification
from training.objectives.masked_image import MaskedImage
from training.objectives.masked_lm import MaskedLM


def built(config, **changes):
    model = build_model({**config, **changes})
    initialise(model, 0)
    return model


def stacked(dataset, count):
    items = [dataset[i] for i in range(count)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class Says(nn.Module):
    """A model that returns what it is told to."""

    def __init__(self, output: ModelOutput):
        super().__init__()
        self.output = output

    def forward(self, batch):
        return self.output


def test_causal_lm_sums_the_counted_tokens_and_their_bytes():
    model, batch = built(LANGUAGE), stacked(language_data().train, 4)
    logits = model({"tokens": batch["tokens"]}).logits
    kept = batch["targets"] != -100
    expected = F.cross_entropy(logits[kept], batch["targets"][kept], reduction="sum").detach()
    objective = CausalLM(Letters())
    with torch.no_grad():
        sums = objective(model, batch)
    torch.testing.assert_close(sums["loss"], expected)
    assert sums["count"] == kept.sum() < kept.numel()
    table = torch.tensor(Letters().token_bytes())
    assert sums["bytes"] == table[batch["targets"][kept]].sum()
    report = objective.report({name: float(value) for name, value in sums.items()})
    assert report["loss"] == pytest.approx(float(expected) / int(kept.sum()))
    assert report["bits_per_byte"] == pytest.approx(
        float(expected) / math.log(2) / float(sums["bytes"])
    )
    assert "bytes" not in objective(model, batch)  # training does not pay for it


def test_auxiliary_losses_and_metrics_leave_out_what_fills_up():
    output = ModelOutput(
        torch.ones(3, 2),
        None,
        {"balance": torch.tensor([1.0, 2.0, 50.0]), "z": torch.tensor([0.5, 0.5, 50.0])},
        {"entropy": torch.tensor(0.25)},
    )
    targets = torch.tensor([[1, 2], [3, -100], [-100, -100]])
    sums = CausalLM()(Says(output), {"targets": targets})
    assert (sums["samples"], sums["auxiliary"], sums["count"]) == (2, 4.0, 3)
    assert sums[METRIC + "entropy"] == 0.5
    report = CausalLM().report({name: float(value) for name, value in sums.items()})
    assert report["auxiliary_loss"] == 2.0
    assert report["entropy"] == 0.25


def test_image_classification_loss_smoothing_and_accuracy():
    model, batch = built(VISION), stacked(vision_data().train, 6)
    batch["targets"] = torch.tensor([0, 1, 2, 0, 1, -100])
    logits = model({"images": batch["images"]}).logits.detach()
    logs = logits.log_softmax(1)
    hard = -logs[torch.arange(5), batch["targets"][:5]]
    objective = ImageClassification(label_smoothing=0.1)
    smooth = objective(model, batch)
    torch.testing.assert_close(smooth["loss"].detach(), (0.9 * hard - 0.1 * logs[:5].mean(1)).sum())
    with torch.no_grad():
        exact = objective(model, batch)
    torch.testing.assert_close(exact["loss"], hard.sum())
    assert exact["count"] == 5
    assert exact["correct"] == (logits[:5].argmax(1) == batch["targets"][:5]).sum()


def test_masked_lm_hides_by_the_recipe():
    objective = MaskedLM(Letters(), seed=3)
    tokens = torch.randint(1, 32, (400, 64))
    tokens[:, 10] = Letters.end
    batch = objective.prepare({"tokens": tokens}, torch.arange(400))
    chosen = batch["targets"] != -100
    assert torch.equal(batch["targets"][chosen], tokens[chosen])
    assert torch.equal(batch["tokens"][~chosen], tokens[~chosen])
    assert not chosen[:, 10].any()
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.01)
    seen = batch["tokens"][chosen]
    assert (seen == Letters.end).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (seen == tokens[chosen]).float().mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("make", [lambda s: MaskedLM(Letters(), s), lambda s: MaskedImage(16, s)])
def test_masks_depend_on_seed_and_sample_alone(make):
    torch.manual_seed(0)
    rows = torch.randint(1, 32, (1, 16)).expand(6, 16)

    def mask(seed, samples):
        batch = {"tokens": rows[: len(samples)]}
        out = make(seed).prepare(batch, torch.tensor(samples))
        return out["mask"] if "mask" in out else out["targets"]

    whole = mask(0, [3, 4, 5, 6])
    assert torch.equal(torch.cat([mask(0, [3]), mask(0, [4, 5]), mask(0, [6])]), whole)
    assert not torch.equal(mask(1, [3, 4, 5, 6]), whole)
    assert len({tuple(row.tolist()) for row in whole}) > 1


def test_masked_lm_leaves_filling_rows_uncounted():
    targets = torch.full((2, 8), -100)
    targets[0, 0] = 5
    batch = {"tokens": torch.randint(1, 32, (2, 8)), "targets": targets}
    out = MaskedLM(Letters(), rate=0.9).prepare(batch, torch.arange(2))
    assert (out["targets"][0] != -100).any()
    assert (out["targets"][1] == -100).all()


def test_masked_lm_trains_an_encoder():
    model = built(LANGUAGE, architecture="encoder")
    objective = choose_objective(None, model, language_data(), seed=0)
    assert isinstance(objective, MaskedLM)
    batch = objective.prepare(stacked(language_data().train, 4), torch.arange(4))
    sums = objective(model, batch)
    logits = model({"tokens": batch["tokens"]}).logits
    kept = batch["targets"] != -100
    expected = F.cross_entropy(logits[kept], batch["targets"][kept], reduction="sum")
    torch.testing.assert_close(sums["loss"], expected)


def test_masked_lm_id_beyond_the_vocabulary():
    with pytest.raises(UserError, match=r"mask_id: 40 .* set model\.vocab=41"):
        build("objective", {"name": "masked_lm", "mask_id": 40}, tokenizer=Letters(), vocab=32)


def test_masked_image_hides_the_ratio_and_averages_images():
    model = built(VISION, reconstruct="pixels")
    objective = choose_objective(None, model, vision_data(), seed=0)
    assert isinstance(objective, MaskedImage)
    batch = objective.prepare(stacked(vision_data().train, 5), torch.arange(5))
    assert batch["mask"].shape == (5, 4)
    assert (batch["mask"].sum(1) == 2).all()  # 0.6 of 4 patches
    batch["targets"][4] = -100
    sums = objective(model, batch)
    losses = model({"images": batch["images"], "mask": batch["mask"]}).token_losses
    torch.testing.assert_close(sums["loss"], losses[:4].sum())
    assert sums["count"] == 4


def test_defaults_follow_the_model():
    assert default_objective(built(LANGUAGE)) == "causal_lm"
    assert default_objective(built(VISION)) == "image_classification"


def test_an_objective_for_other_data_is_the_users_mistake():
    with pytest.raises(UserError, match="for language, the data is vision"):
        choose_objective("causal_lm", built(VISION), vision_data(), 0)
    with pytest.raises(UserError, match="needs data with a tokenizer"):
        choose_objective("masked_lm", built(LANGUAGE), SimpleNamespace(tokenizer=None), 0)
