"""A row of the GPU queue's table, and the table."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One thing that was run on a GPU.

    status: ok; failed (it ran and is wrong, or it broke); refused (this machine cannot run it).
    figure, unit: what was measured, None where nothing was.
    note: in words, one line.
    """

    name: str
    status: Literal["ok", "failed", "refused"]
    figure: float | None = None
    unit: str = ""
    note: str = ""


def attempt(name: str, run: Callable[[], Row]) -> Row:
    """The row of a part, or that it broke; the traceback goes to standard error."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        line = (str(error).strip() or "no message").splitlines()[0]
        return Row(name, "failed", note=f"{type(error).__name__}: {line}")


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| part | status | figure | note |", "|---|---|---|---|"]
    for row in rows:
        figure = "" if row.figure is None else f"{row.figure:.3g} {row.unit}".strip()
        lines.append(f"| {row.name} | {row.status} | {figure} | {row.note} |")
    return "\n".join(lines)
