"""What cannot run under a layout is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from core.errors import UserError
from core.registry import _entries, _lookup, register
from evaluation.contracts.parity import on_meta
from model.leaves import ColumnLinear, RowLinear
from model.mixers.base import Mixer
from model.stream import Stream
from parallel.check import check_model
from parallel.layout import Layout


class Whole(Mixer):
    """A mixer that is not to be split."""

    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = ColumnLinear(dim, dim), RowLinear(dim, dim)

    def forward(self, x_BTD: Tensor, stream: Stream) -> Tensor:
        return self.down(self.up(x_BTD))


def model(**changes: Any) -> Any:
    block = {"mixer": {"name": "attention", "heads": 4, "kv_heads": 2}, "feedforward": "mlp"}
    config = {"kind": "language", "dim": 32, "depth": 1, "vocab": 64, "max_length": 8}
    return on_meta({**config, "block": block, **changes})


def test_a_layout_that_fits() -> None:
    check_model(Layout(tp=2, sequence_parallel=True), model(), recompute="block", compile=True)


def test_heads() -> None:
    with pytest.raises(UserError, match=r"4 does not divide kv_heads \(2\) .*use parallel.tp=2"):
        check_model(Layout(tp=4), model())


def test_vocabulary() -> None:
    with pytest.raises(UserError) as caught:
        check_model(Layout(tp=2), model(vocab=63))
    assert str(caught.value) == (
        "parallel.tp: 2 does not divide axis 0 (63) of embedding.weight; "
        "use parallel.tp=1, or make it 64"
    )


@pytest.mark.parametrize(
    ("contract", "layout", "options"),
    [
        ("tp", Layout(tp=2), {}),
        ("sp", Layout(tp=2, sequence_parallel=True), {}),
        ("fsdp", Layout(fsdp=2), {}),
        ("ep", Layout(ep=2), {}),
        ("recompute", Layout(), {"recompute": "block"}),
        ("compile", Layout(), {"compile": True}),
    ],
)
def test_what_a_mechanism_declares(contract: str, layout: Layout, options: dict[str, Any]) -> None:
    reason = "its sum over tokens has no parallel form"
    register("mixer", "whole", cannot={contract: reason})(Whole)
    try:
        chosen = model(block={"mixer": "whole", "feedforward": "mlp", "position": "none"})
        with pytest.raises(UserError, match=f"mixer 'whole' cannot do {contract}: {reason}"):
            check_model(layout, chosen, **options)
        check_model(Layout(replicate=2), chosen)
    finally:
        del _entries["mixer"]["whole"], _lookup["mixer"]["whole"]


def experts(*numbers: int) -> Any:
    """A model with a bank of so many experts in each block."""
    block = {"mixer": {"name": "attention", "heads": 4}}
    banks = [{"name": "moe", "experts": number, "top_k": 1} for number in numbers]
    blocks = [{**block, "feedforward": bank} for bank in banks]
    return model(block=blocks, depth=len(blocks))


def test_experts_divide_between_the_ranks_of_their_axis() -> None:
    check_model(Layout(ep=2), experts(4, 6))
    with pytest.raises(UserError) as caught:
        check_model(Layout(ep=4), experts(4, 6))
    assert str(caught.value) == (
        "parallel.ep: 4 does not divide the 6 experts of "
        "stack.blocks.1.sublayers.feedforward.branch.experts.gate; "
        "use parallel.ep=2, or make them 8"
    )


def test_an_expert_axis_without_experts() -> None:
    with pytest.raises(UserError, match=r"parallel\.ep: 2, but the model has no experts; use"):
        check_model(Layout(ep=2), model())
