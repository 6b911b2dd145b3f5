"""The size of the hidden state behind every block, under every layout."""

import pytest
import torch

from core.errors import UserError
from model.block import Block
from tests.training.helpers import LANGUAGE, Losses, language_data, make_engine, make_trainer
from training.callbacks.base import Callback

MODEL = {**LANGUAGE, "block": {**LANGUAGE["block"], "feedforward": {"name": "swiglu", "ratio": 2}}}
LAYOUTS = {
    "replicate2": {"replicate": 2, "fsdp": 1},
    "fsdp2": {"fsdp": 2},
    "tp2": {"tp": 2},
    "tp2+sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "zbv": {"pp": 2, "schedule": "zbv"},
    "cp2": {"cp": 2},
}


def logged(layout=None, **options):
    collected = Losses()
    engine = make_engine(**(layout or {}))
    make_trainer(
        language_data(), MODEL, engine, callbacks=[collected], **{"steps": 3, **options}
    ).run()
    return [
        [value for name, value in record.items() if name.startswith("residual/")]
        for record in collected.records
    ]


class Outputs(Callback):
    """What blocks give, seen from outside."""

    def __init__(self):
        self.hidden = {0: [], 1: []}

    def start(self, trainer):
        blocks = [m for m in trainer.engine.model.modules() if isinstance(m, Block)]
        for number, block in enumerate(blocks):
            block.register_forward_hook(
                lambda module, given, stream, number=number: self.hidden[number].append(
                    stream.hidden.detach().clone()
                )
            )


def test_it_is_the_root_mean_square_over_all_micro_batches():
    collected, outputs = Losses(), Outputs()
    make_trainer(steps=1, micro_batch=4, callbacks=[collected, outputs]).run()
    for number in range(2):
        # Two micro-batches of the step; what follows is validation, which must not count.
        whole = torch.cat(outputs.hidden[number][:2])
        assert whole.shape == (8, 8, 16)
        expected = whole.double().square().mean().sqrt().item()
        assert collected.records[0][f"residual/{number}/rms"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_measure_what_one_does(ranks, layout):
    alone = logged(micro_batch=2)
    assert [len(record) for record in alone] == [2, 2, 2]
    for theirs in ranks.run(logged, LAYOUTS[layout], micro_batch=2):
        for mine, yours in zip(alone, theirs, strict=True):
            assert yours == pytest.approx(mine, rel=1e-4)


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputation_is_not_counted_twice(recompute):
    assert logged(recompute=recompute)[0] == pytest.approx(logged()[0], rel=1e-6)


def test_it_can_be_left_out_and_looks_at_logged_steps_only(monkeypatch):
    assert logged(layer_norms=False)[0] == []
    calls = []
    monkeypatch.setattr(
        "training.callbacks.layer_norms.LayerNorms._add", lambda *given: calls.append(given)
    )
    logged(steps=4, log_every=4)
    assert len(calls) == 2  # two blocks, in the last step


def test_a_timeline_of_a_step_that_will_not_come_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.timeline: there is no step 11; the run has 10"):
        make_trainer(timeline=11, folder=tmp_path)
