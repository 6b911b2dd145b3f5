"""2.5D: squares of ranks that share the rows and hold the same weights."""

from __future__ import annotations

import pytest

from evaluation.contracts.ranks import Ranks
from tests.parallel.grids.chain import D, F, G, N, prove


def test_two_squares_of_one_rank(ranks: Ranks) -> None:
    """Depth alone: rows are divided, weights are not."""
    held = prove(ranks, "2.5d", 2)
    assert held == {"x": N * D // 2, "w": D * F, "h": N * F // 2, "v": F * G, "y": N * G // 2}


@pytest.mark.slow
def test_two_squares_of_four_ranks(eight_ranks: Ranks) -> None:
    held = prove(eight_ranks, "2.5d", 2)
    assert held == {
        "x": N * D // 8, "w": D * F // 4, "h": N * F // 8, "v": F * G // 4, "y": N * G // 8,
    }  # fmt: skip
