"""Reductions over the tensor axis are in flight while the next branch computes, both ways.

The functions named `…_on_a_rank` run on every rank of the pool. They note when a message is
launched, when its result is first waited for, and when each branch begins its forward and its
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

import parallel.collectives as collectives
from evaluation.contracts.parity import Loss, share, start, whole
from evaluation.contracts.ranks import Ranks
from model.block import Block
from parallel.native import NativeEngine
from parallel.tensor import TensorOperations
from tests.parallel.test_parity import batch

DEPTH = 3
LAST = 2 * DEPTH - 1
"""The last branch; each block has two."""
HEAD = LAST + 1
"""In the backward pass the head's message comes before those of the branches."""
Event = tuple[str, int]


def config(residual: str) -> dict[str, Any]:
    return {
        "kind": "language", "dim": 32, "depth": DEPTH, "vocab": 64, "max_length": 16,
        "block": {
            "residual": residual,
            "mixer": {"name": "attention", "heads": 4},
            "feedforward": {"name": "swiglu", "ratio": 2},
        },
    }  # fmt: skip


@contextmanager
def noted(events: list[Event], first: int, step: int) -> Iterator[None]:
    """Note ("launch", i) and ("wait", i) of messages, i counting from `first` in steps of `step`.

    Messages that are not of the stream's size, the loss's three numbers a row, are left out.
    """
    numbers: dict[int, int] = {}
    held: list[Tensor] = []  # so that no two messages share an address
    former = functional.all_reduce, collectives._scatter
    waits = AsyncCollectiveTensor.wait, AsyncCollectiveTensor.trigger_wait

    def launching(launch: Any) -> Any:
        def noting(x: Tensor, *args: Any) -> Tensor:
            result: Any = launch(x, *args)
            if x.dim() == 3:
                number = first + step * len(numbers)
                numbers[result.elem.data_ptr()] = number
                held.append(result.elem)
                events.append(("launch", number))
            return result

        return noting

    def waiting(wait: Any) -> Any:
        def noting(self: Any) -> Tensor:
            event = ("wait", numbers.get(self.elem.data_ptr(), -1))
            if event[1] >= 0 and event not in events:
                events.append(event)
            result: Tensor = wait(self)
            return result

        return noting

    functional.all_reduce, collectives._scatter = (launching(each) for each in former)
    both: Any = AsyncCollectiveTensor
    both.wait, both.trigger_wait = (waiting(each) for each in waits)
    try:
        yield
    finally:
        functional.all_reduce, collectives._scatter = former
        both.wait, both.trigger_wait = waits


def branches(model: nn.Module) -> list[nn.Module]:
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return [sub.branch for block in blocks for sub in block.sublayers.values()]  # type: ignore[misc]


def prepared(residual: str, sequence_parallel: bool, lazy: bool) -> NativeEngine:
    engine = start({"tp": 2, "sequence_parallel": sequence_parallel}, config(residual))
    for module in engine.model.modules():
        operations = getattr(module, "ops", None)
        if isinstance(operations, TensorOperations):
            operations.lazy = lazy
    return engine


def pass_on_a_rank(
    residual: str, sequence_parallel: bool = False, lazy: bool = True, later: int | None = None
) -> tuple[list[Event], list[Event]]:
    """The events of one forward and one backward pass, and of each branch's beginning."""
    engine = prepared(residual, sequence_parallel, lazy)
    own = share(engine, batch())
    engine.forward_backward(own, Loss())  # the first step's order is not promised
    forward: list[Event] = []
    backward: list[Event] = []
    for number, branch in enumerate(branches(engine.model)):
        branch.register_forward_pre_hook(
            lambda *_, number=number: forward.append(("begin", number))
        )
        branch.register_forward_hook(
            lambda module, args, y, number=number: (
                y.register_hook(lambda grad: backward.append(("begin", number))) and None
            )
        )
    former, collectives.LATER = collectives.LATER, later or collectives.LATER
    try:
        with noted(forward, -1, 1):  # the embedding's comes first
            loss = Loss()(engine.model, own[0])["loss"]
        with noted(backward, HEAD, -1):
            loss.backward()
    finally:
        collectives.LATER = former
    return forward, backward


def in_flight(events: list[Event], first: int, second: int) -> bool:
    """Whether the first branch's message travels while all of the second branch computes."""
    order = [("launch", first), ("begin", second), ("launch", second), ("wait", first)]
    places = [events.index(event) for event in order]
    return places == sorted(places)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ladder_forward(ranks: Ranks, sequence_parallel: bool) -> None:
    for events, _ in ranks.run(pass_on_a_rank, "ladder", sequence_parallel):
        assert all(in_flight(events, k, k + 1) for k in range(LAST)), events


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ladder_backward(ranks: Ranks, sequence_parallel: bool) -> None:
    for _, events in ranks.run(pass_on_a_rank, "ladder", sequence_parallel):
        assert all(in_flight(events, k, k - 1) for k in range(LAST, 0, -1)), events
        assert events.index(("wait", HEAD)) < events.index(("begin", LAST))


def test_what_takes_the_overlap_away(ranks: Ranks) -> None:
    """Standard residual reads at once; so does a model that waits at once; and in autograd's own
    order the gradient is read before the next branch, though nothing there needs it."""
    for changes in (
        {"residual": "standard"},
        {"residual": "ladder", "lazy": False},
        {"residual": "ladder", "later": 1},
    ):
        for forward, backward in ranks.run(pass_on_a_rank, **changes):
            assert not any(in_flight(backward, k, k - 1) for k in range(LAST, 0, -1)), backward
            flies = [in_flight(forward, k, k + 1) for k in range(LAST)]
            assert flies == [("later" in changes)] * LAST, forward


def gradients_on_a_rank(sequence_parallel: bool) -> list[bool]:
    """Is every gradient, bit for bit, that of waiting at once?"""
    found = []
    for lazy in (True, False):
        engine = prepared("ladder", sequence_parallel, lazy)
        for _ in range(2):
            engine.forward_backward(share(engine, batch()), Loss())
        named = engine.model.named_parameters()
        found.append({n: whole(p.grad) for n, p in named if p.grad is not None})
    assert found[0]
    return [torch.equal(found[0][name], value) for name, value in found[1].items()]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_same_gradients(ranks: Ranks, sequence_parallel: bool) -> None:
    for same in ranks.run(gradients_on_a_rank, sequence_parallel):
        assert all(same)
