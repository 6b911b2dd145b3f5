"""1D: a pair of products, by columns and by rows."""

from __future__ import annotations

from evaluation.contracts.ranks import Ranks
from tests.parallel.grids.chain import D, F, G, N, prove


def test_the_serial_pair(ranks: Ranks) -> None:
    """Weights and what lies between are halved; what enters and leaves is whole."""
    held = prove(ranks, "1d")
    assert held == {"x": N * D, "w": D * F // 2, "h": N * F // 2, "v": F * G // 2, "y": N * G}
