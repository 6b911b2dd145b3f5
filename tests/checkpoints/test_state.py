"""Logical names: where each leaf of a state is, and what a rank writes of it."""

from __future__ import annotations

import pytest
import torch

from checkpoints.state import Leaves, Piece, check_wanted
from core.errors import UserError
from parallel.fragment import Fragment


def test_names() -> None:
    state = {
        "model": {"blocks.0.w": torch.zeros(2)},
        "optimizer": {"state": {"w": {"m": torch.zeros(2)}}, "groups": [{"lr": 0.1, "b": (1, 2)}]},
        "progress": {"step": 3},
        "rng": {"torch": torch.zeros(4)},
    }
    leaves = Leaves.of(state, rank=5)
    assert list(leaves.tensors) == ["model/blocks.0.w", "optimizer/state/w/m", "rng/5/torch"]
    assert list(leaves.values) == ["optimizer/groups/0/lr", "optimizer/groups/0/b"]
    assert leaves.sections == {"model", "optimizer"}


def test_values_are_set_where_they_were() -> None:
    state = {"optimizer": {"groups": [{"betas": (0.9, 0.95), "names": ["a"]}]}}
    leaves = Leaves.of(state, rank=0)
    leaves.values["optimizer/groups/0/betas"].set([0.8, 0.9])
    leaves.values["optimizer/groups/0/names"].set(["b"])
    assert state == {"optimizer": {"groups": [{"betas": (0.8, 0.9), "names": ["b"]}]}}


def test_a_piece_shares_memory_unless_copied() -> None:
    weight = torch.zeros(3)
    (shared,), (copied,) = (Piece.all_of("w", weight, copy=copy) for copy in (False, True))
    weight.fill_(1)
    assert shared.data.tolist() == [1, 1, 1]
    assert copied.data.tolist() == [0, 0, 0]


def test_a_fragment_is_a_piece_for_each_of_its_boxes() -> None:
    flat = torch.arange(5.0)
    fragment = Fragment.of(flat, 2, shape=(3, 3), part=(3, 3), at=(0, 0))
    pieces = Piece.all_of("w", fragment, copy=False)
    assert [(piece.offsets, piece.data.tolist()) for piece in pieces] == [
        ((0, 2), [[0.0]]),
        ((1, 0), [[1.0, 2.0, 3.0]]),
        ((2, 0), [[4.0]]),
    ]
    assert all(piece.shape == (3, 3) for piece in pieces)
    assert Leaves.of({"model": {"w": fragment}}, 0).tensors["model/w"] is fragment


def test_the_nearest_name_is_of_the_same_section() -> None:
    wanted = Leaves.of({"model": {"head": torch.zeros(1)}, "ema": {"heads": torch.zeros(1)}}, 0)
    with pytest.raises(UserError, match=r"no 'model/heads', .*; did you mean 'model/head'\?"):
        check_wanted(["model/heads", "other/x"], [False, False], wanted)
    check_wanted(["other/x"], [False], wanted)  # a section that was not asked for
