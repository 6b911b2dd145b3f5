"""What came out of the contracts: one JSON file, for `manyforms zoo --matrix` and the docs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.registry import Entry

Status = Literal["proven", "declared", "failed"]


@dataclass(frozen=True)
class Result:
    """One contract of one mechanism; `reason`: why it is declared impossible, or what failed."""

    mechanism: str
    contract: str
    status: Status
    reason: str = ""


def declared(entry: Entry, contract: str) -> str | None:
    """Why the mechanism says it cannot do this, or None."""
    return entry.cannot.get(contract)


def save(results: Iterable[Result], path: Path) -> dict[str, dict[str, str]]:
    """Write results as {"slot:name": {contract: "proven" | "declared: …" | "failed: …"}}."""
    table: dict[str, dict[str, str]] = {}
    for result in results:
        text = result.status + (f": {result.reason}" if result.reason else "")
        table.setdefault(result.mechanism, {})[result.contract] = text
    ordered = {name: dict(sorted(table[name].items())) for name in sorted(table)}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    return ordered


def load(path: Path) -> dict[str, dict[str, str]]:
    """What `save` wrote; empty if there is no such file."""
    if not path.is_file():
        return {}
    table: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf8"))
    return table
