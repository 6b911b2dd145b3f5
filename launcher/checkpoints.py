"""`manyforms checkpoint list` and `verify`."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from checkpoints.inspect import Row, rows
from launcher.exits import FAILED, OK


def show(place: Path, verify: bool) -> int:
    """Print a run's checkpoints; the exit code says whether one of them is damaged."""
    found = rows(place, verify=verify)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("step", "size", "saved", "ranks", "state"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for row in found:
        table.add_row(*_cells(row, "verified" if verify else "looks whole"))
    Console().print(table)
    return FAILED if any(row.flaw for row in found) else OK


def _cells(row: Row, good: str) -> list[str]:
    return [
        str(row.step),
        "" if row.size is None else size(row.size),
        "" if row.age is None else f"{duration(row.age)} ago",
        "" if row.ranks is None else str(row.ranks),
        row.flaw or good,
    ]


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A length of time in its largest fitting unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
