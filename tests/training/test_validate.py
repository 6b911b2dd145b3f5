"""Held-out evaluation: exact whatever the batches and the ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError
from tests.training.helpers import Items, Letters, language_data, make_trainer, vision_data
from training.validate import validate


def direct(trainer):
    """The sum over single samples, by plain math."""
    loss = count = text = 0.0
    table = torch.tensor(Letters().token_bytes())
    for item in trainer.data.validation:
        kept = item["targets"] != -100
        with torch.no_grad():
            logits = trainer.engine.model({"tokens": item["tokens"][None]}).logits[0]
        loss += float(F.cross_entropy(logits[kept], item["targets"][kept], reduction="sum"))
        count += int(kept.sum())
        text += int(table[item["targets"][kept]].sum())
    return {"loss": loss / count, "bits_per_byte": loss / math.log(2) / text}


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 11, 64])
def test_every_sample_counts_once_at_any_micro_batch(micro_batch):
    trainer = make_trainer()  # 11 held-out samples
    measured = validate(
        trainer.engine, trainer.objective, trainer.data.validation, micro_batch=micro_batch
    )
    assert measured == pytest.approx(direct(trainer), rel=1e-6)


def test_limit_reads_only_so_many():
    trainer = make_trainer(language_data(validation=40))
    arguments = (trainer.engine, trainer.objective)
    some = validate(*arguments, trainer.data.validation, micro_batch=4, limit=10)
    chosen = Items([trainer.data.validation[i * 4] for i in range(10)])
    assert some == pytest.approx(validate(*arguments, chosen, micro_batch=4), rel=1e-9)


def test_accuracy():
    trainer = make_trainer(vision_data(), steps=30, optimizer={"name": "adamw", "lr": 1e-2})
    trainer.run()
    right = 0
    trainer.engine.model.eval()
    for item in trainer.data.validation:
        logits = trainer.engine.model({"images": item["images"][None]}).logits[0]
        right += int(logits.argmax() == item["targets"])
    assert trainer.validate()["accuracy"] == right / 10
    assert right > 5


def test_dropout_is_off_and_training_goes_on():
    from tests.training.test_trainer import DROPPING

    trainer = make_trainer(model=DROPPING)
    trainer.engine.model.train()
    assert trainer.validate() == trainer.validate()
    assert trainer.engine.model.training


def test_nothing_held_out_is_the_users_mistake():
    trainer = make_trainer()
    with pytest.raises(UserError, match="validation set is empty"):
        validate(trainer.engine, trainer.objective, Items([]), micro_batch=1)
