"""Costs by hand; the proofs on ranks compare them with what is measured."""

from __future__ import annotations

import pytest

from parallel.grids import Cost, cost, sizes


@pytest.mark.parametrize(
    ("form", "axes", "expected"),
    [
        ("column", {"line": 4}, Cost(96, 48, 32, 0.0, 2 * 96 * 3 / 4)),
        ("row", {"line": 4}, Cost(24, 48, 128, 2 * 128 * 3 / 4, 0.0)),
        ("2d", sizes("2d", 4), Cost(24, 48, 32, 72.0, 144.0)),
        ("2.5d", sizes("2.5d", 8, 2), Cost(12, 48, 16, 60.0, 120.0 + 48)),
        ("3d", sizes("3d", 8), Cost(12, 24, 16, 52.0, 88.0)),
    ],
)
def test_cost(form: str, axes: dict[str, int], expected: Cost) -> None:
    """8 × 12 by 12 × 16."""
    assert cost(form, axes, 8, 12, 16) == expected
