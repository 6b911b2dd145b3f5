"""2D: nothing is held twice on a square of ranks."""

from __future__ import annotations

import pytest

from evaluation.contracts.ranks import Ranks
from tests.parallel.grids.chain import D, F, G, N, prove


@pytest.mark.slow
def test_the_serial_pair_on_a_square(four_ranks: Ranks) -> None:
    held = prove(four_ranks, "2d")
    whole = {"x": N * D, "w": D * F, "h": N * F, "v": F * G, "y": N * G}
    assert held == {name: elements // 4 for name, elements in whole.items()}
