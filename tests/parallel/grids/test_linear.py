"""The functions on one rank, where every grid is the serial product; and what they refuse."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from evaluation.contracts.ranks import Ranks
from parallel.grids import matmul, split
from tests.parallel.grids.chain import grid_on_a_rank, prove

KINDS = [("1d", None), ("2d", None), ("2.5d", 1), ("3d", None)]


def test_every_kind_on_one_rank() -> None:
    one = Ranks(1)
    try:
        for kind, depth in KINDS:
            prove(one, kind, depth)
    finally:
        one.close()


def uneven_on_a_rank() -> None:
    split(torch.zeros(4, 5), grid_on_a_rank("1d", None), "weight")


def test_uneven_blocks(ranks: Ranks) -> None:
    with pytest.raises(UserError, match="the weight's 5 columns cannot be divided between 2 ranks"):
        ranks.run(uneven_on_a_rank)


def unturned_on_a_rank() -> None:
    grid = grid_on_a_rank("1d", None)
    h_NF = matmul(torch.zeros(2, 4), split(torch.zeros(4, 6), grid, "weight"), grid)
    matmul(h_NF, split(torch.zeros(6, 4), grid, "weight"), grid)


def test_the_same_grid_twice(ranks: Ranks) -> None:
    with pytest.raises(UserError, match=r"\(2, 3\) and \(6, 2\) cannot be multiplied.*turned"):
        ranks.run(unturned_on_a_rank)
