"""What a run's folder holds, read without torch; what is missing stays empty."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError

PER_LAYER = re.compile(r"(?P<mechanism>.+)/(?P<layer>\d+)/(?P<what>.+)")
"""How a mechanism names what it reports of a layer: `moe/3/load`."""
Points = list[tuple[int, float]]
Rows = list[tuple[int, list[float]]]


@dataclass
class Run:
    """A run's files; all but `folder` may be empty."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    """Of `metrics.jsonl`, in order of step."""
    events: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    timelines: list[dict[str, Any]] = field(default_factory=list)
    """One of each rank, in order of rank."""

    @property
    def name(self) -> str:
        return str((self.config.get("run") or {}).get("name") or self.folder.resolve().name)

    @property
    def steps(self) -> int:
        """The last logged step."""
        return int(self.records[-1]["step"]) if self.records else 0

    def points(self, name: str) -> Points:
        """A scalar metric: (step, value) where it was measured."""
        return [(r["step"], float(r[name])) for r in self.records if _number(r.get(name))]

    def rows(self, name: str) -> Rows:
        """A vector metric: (step, values) where it was measured."""
        found = [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), list)]
        return [(step, [float(v) for v in values]) for step, values in found]

    def scalars(self) -> list[str]:
        """The names of scalar metrics that belong to no layer, in the order they appeared."""
        names = {name: None for r in self.records for name, v in r.items() if _number(v)}
        return [name for name in names if name != "step" and not PER_LAYER.fullmatch(name)]

    def layers(self) -> dict[tuple[str, str], dict[int, str]]:
        """(mechanism, what) → layer → the metric's name; held-out values of them are left out."""
        found: dict[tuple[str, str], dict[int, str]] = {}
        for name in {name: None for record in self.records for name in record}:
            match = PER_LAYER.fullmatch(name)
            if match is not None and not name.startswith("val/"):
                key = (match["mechanism"], match["what"])
                found.setdefault(key, {})[int(match["layer"])] = name
        return {key: dict(sorted(layers.items())) for key, layers in found.items()}


def read_run(folder: Path) -> Run:
    """Read whatever a run has left.

    Raises:
        UserError: the folder is none, or no run's.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run's folder, such as runs/quickstart")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"{folder}: is no run's folder: it has neither config.yaml nor metrics.jsonl"
        )
    timelines = [_json(path) for path in folder.glob("timeline/rank-*.json")]
    return Run(
        folder,
        config=_yaml(folder / "config.yaml"),
        records=[r for r in _lines(folder / "metrics.jsonl") if _number(r.get("step"))],
        events=_lines(folder / "events.jsonl"),
        summary=_json(folder / "summary.json"),
        timelines=sorted((t for t in timelines if t.get("spans")), key=lambda t: int(t["rank"])),
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line cut short by a crash is left out."""
    found = []
    for line in _text(path).splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf8") if path.is_file() else ""
