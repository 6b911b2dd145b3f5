"""Which grids there are."""

from __future__ import annotations

import pytest

from core.errors import UserError
from parallel.grids import sizes


def test_sizes() -> None:
    assert sizes("1d", 6) == {"line": 6}
    assert sizes("2d", 9) == {"row": 3, "column": 3}
    assert sizes("2.5d", 18, 2) == {"depth": 2, "row": 3, "column": 3}
    assert sizes("3d", 27) == {"weight": 3, "input": 3, "output": 3}


@pytest.mark.parametrize(
    ("kind", "processes", "depth", "message"),
    [
        ("2d", 8, None, "a square, and 8 processes are not; use 4 or 9"),
        ("3d", 9, None, "a cube, and 9 processes are not; use 8 or 27"),
        ("2.5d", 8, 3, "8 processes are not 3 squares; with that many, a depth of 2 or 8"),
        ("2.5d", 8, None, "needs a depth"),
        ("2d", 4, 2, "a 2d grid has no depth"),
        ("2.5", 4, None, "no kind '2.5'; did you mean '2.5d'"),
    ],
)
def test_no_such_grid(kind: str, processes: int, depth: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sizes(kind, processes, depth)
