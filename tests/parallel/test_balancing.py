"""Biases that balance experts take the steps of one process under every layout, bit for bit.

The functions named `…_on_a_rank` run on every rank of the pool.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.contracts.parity import Loss, share, start, whole
from evaluation.contracts.ranks import Ranks
from tests.parallel.test_parity import batch, config
from training.callbacks.stepped import Stepped

STEPS = 5
SPARSE = {
    "mixer": {"name": "attention", "heads": 4},
    "feedforward": {
        "name": "deepseek_moe", "experts": 6, "top_k": 2, "groups": 3, "top_groups": 2,
        "width": 16, "bias_update": 0.002,
    },
}  # fmt: skip
DENSE = {**SPARSE, "feedforward": "swiglu"}


def trained_on_a_rank(
    layout: dict[str, Any], config: Any, prepare: dict[str, Any]
) -> dict[str, Tensor]:
    """Every bias, whole, after a few optimizer steps of two micro-batches each."""
    engine = start(layout, config, **prepare)
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    loop: Any = SimpleNamespace(engine=engine, step=0)
    stepped = Stepped(0)
    stepped.start(loop)
    for _ in range(STEPS):
        engine.forward_backward(share(engine, batch(8), 2), Loss())
        optimizer.step()
        loop.step += 1
        stepped.step(loop, None)
    named = engine.model.named_parameters()
    return {name: whole(p.detach()) for name, p in named if name.endswith("router.balance")}


def check(ranks: Ranks, layout: dict[str, Any], blocks: Any, **prepare: Any) -> None:
    model = {**config("experts"), "block": blocks}
    wanted = trained_on_a_rank({}, model, {})
    assert len(wanted) == sum(block is SPARSE for block in blocks)
    for value in wanted.values():
        assert len(value.unique()) > 3  # experts went their own ways
    held: dict[str, Tensor] = {}
    for found in ranks.run(trained_on_a_rank, layout, model, prepare):
        for name, value in found.items():
            assert value.equal(wanted[name]), (name, value, wanted[name])
        held |= found
    assert held.keys() == wanted.keys()


LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "fsdp2": {"fsdp": 2},
    "tp2": {"tp": 2},
    "cp2": {"cp": 2},
    "replicate2": {"replicate": 2, "fsdp": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks(ranks: Ranks, layout: str) -> None:
    """Breaks if a load is summed over too few ranks, or each micro-batch moves the biases."""
    check(ranks, LAYOUTS[layout], [SPARSE, SPARSE])


def test_recomputed(ranks: Ranks) -> None:
    check(ranks, {"ep": 2}, [SPARSE, SPARSE], recompute="block")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2}, {"ep": 2, "fsdp": 2}], ids=str)
def test_four_ranks(four_ranks: Ranks, layout: dict[str, Any]) -> None:
    check(four_ranks, layout, [SPARSE, SPARSE])


@pytest.mark.parametrize("blocks", [[DENSE, SPARSE], [SPARSE, SPARSE]], ids=["one", "both"])
def test_a_pipeline_whose_stages_may_have_no_experts(ranks: Ranks, blocks: Any) -> None:
    """Breaks (by a time-out) if ranks of another stage are asked for their load."""
    check(ranks, {"pp": 2}, blocks)
