"""Layered gradient accumulation: the gradients of ordinary accumulation, with fewer messages.

The functions named `…_on_a_rank` run on every rank of the pool.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from core.errors import UserError
from evaluation.contracts.parity import Loss, compare, on_meta, share, start
from evaluation.contracts.ranks import Ranks
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.native import NativeEngine
from parallel.traffic import Traffic, group_axes
from tests.parallel.test_parity import TOLERANCE, batch, config
from tests.parallel.test_pipeline import HIERARCHY, LOSSY, images

LAYERED: dict[str, Any] = {"fsdp": 2, "accumulation": "layered"}


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_gradients(ranks: Ranks, micro_batches: int, recompute: str) -> None:
    found = compare(
        ranks,
        LOSSY,
        batch(8),
        {"layered": LAYERED},
        micro_batches=micro_batches,
        prepare={"recompute": recompute},
        stirred=True,
    )["layered"]
    assert found.worst < TOLERANCE, found


def test_hierarchical_vision(ranks: Ranks) -> None:
    found = compare(ranks, HIERARCHY, images(), {"": LAYERED}, micro_batches=2, stirred=True)[""]
    assert found.worst < TOLERANCE, found


def messages_on_a_rank(layout: dict[str, Any], micro_batches: int, recompute: str) -> Counter[str]:
    """How many collectives of each kind a step takes over the data axis."""
    engine = start(layout, config("llama"), recompute=recompute)
    loss, batches = Loss(), share(engine, batch(8), micro_batches)
    engine.forward_backward(batches, loss)  # the first step sets FSDP2 up
    assert engine.mesh is not None
    with Traffic(group_axes(engine.mesh, engine.layout)) as traffic:
        engine.forward_backward(batches, loss)
    return Counter(message.operation for message in traffic.messages)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_one_gather_of_a_layer_in_each_pass(ranks: Ranks, recompute: str) -> None:
    """Two blocks, each gathered forward and backward, and once what is outside of them."""
    for micro_batches in (1, 2, 4):
        for found in ranks.run(messages_on_a_rank, LAYERED, micro_batches, recompute):
            assert found["all_gather"] == 2 * 2 + 1
            assert found["reduce_scatter"] == 2 + 1
    in_turn = ranks.run(messages_on_a_rank, {"fsdp": 2}, 4, recompute)[0]
    assert in_turn["all_gather"] > 4 * 2, "ordinary accumulation gathers for every micro-batch"


def trained_on_a_rank(layout: dict[str, Any], precision: str) -> list[float]:
    engine = start(layout, LOSSY, precision=precision)
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        sums = engine.forward_backward(share(engine, batch(8), 2), Loss())
        engine.clip_gradients(0.5)
        optimizer.step()
        engine.evaluate(batch(2), Loss())
        losses.append(float(engine.total(sums["loss"]) / engine.total(sums["count"])))
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training(ranks: Ranks, precision: str) -> None:
    wanted = ranks.run(trained_on_a_rank, {"fsdp": 2}, precision)[0]
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for found in ranks.run(trained_on_a_rank, LAYERED, precision):
        assert found == pytest.approx(wanted, rel=tolerance)
    assert wanted[-1] < wanted[0]


def test_of_no_use_without_fsdp() -> None:
    engine = NativeEngine(Layout(), torch.device("cpu"), ParallelConfig(accumulation="layered"))
    with pytest.raises(UserError, match="layered spares FSDP's messages"):
        engine.prepare(on_meta(config("llama")), seed=0)
    with pytest.raises(ValueError, match="use schedule: modular"):
        ParallelConfig(accumulation="layered", pp=2)
