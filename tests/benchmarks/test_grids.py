"""The table's measured numbers are the analytic ones, on two ranks."""

from __future__ import annotations

import pytest

from benchmarks.grids import Case, Costs, analytic, line, measured
from evaluation.contracts.ranks import Ranks

SHAPE = 8, 12, 16
COLUMNS = Case("1D by columns", "column", "1d", 2)


@pytest.mark.parametrize("case", [COLUMNS, Case("1D by rows", "row", "1d", 2)])
def test_measured(ranks: Ranks, case: Case) -> None:
    assert ranks.run(measured, case, SHAPE) == [analytic(case, SHAPE)] * 2


def test_analytic() -> None:
    """By hand: X of 96, half of W's 192, half of Y's 128; X's gradient is summed over two ranks."""
    assert analytic(COLUMNS, SHAPE) == Costs(4 * 256, 4 * 192, 0, 4 * 96)


def test_line() -> None:
    shown = line(COLUMNS, Costs(1024, 2048, 0, 1536), Costs(1024, 4096, 0, 1536))
    assert shown == "| 1D by columns | 2 | 1.0 / 1.0 | 2.0 / 4.0 | 0.0 / 0.0 | 1.5 / 1.5 |"
