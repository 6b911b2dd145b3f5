"""3D: nothing is held twice on a cube of ranks."""

from __future__ import annotations

import pytest

from evaluation.contracts.ranks import Ranks
from tests.parallel.grids.chain import D, F, G, N, prove


@pytest.mark.slow
def test_the_serial_pair_on_a_cube(eight_ranks: Ranks) -> None:
    held = prove(eight_ranks, "3d")
    whole = {"x": N * D, "w": D * F, "h": N * F, "v": F * G, "y": N * G}
    assert held == {name: elements // 8 for name, elements in whole.items()}
