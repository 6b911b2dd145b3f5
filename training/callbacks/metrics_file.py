"""metrics.jsonl: one object a logged step, floats with full precision; vectors as lists."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from training.callbacks.base import Callback, Loop, Record
from training.outcome import Outcome


class MetricsFile(Callback):
    """Appends records; a resumed run first drops what a former one wrote past its checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[str] | None = None

    def start(self, trainer: Loop) -> None:
        if trainer.first:
            _keep_until(self.path, trainer.step)
            self._file = open(self.path, "a", encoding="utf8")  # noqa: SIM115 - closed in `end`

    def step(self, trainer: Loop, record: Record | None) -> None:
        if self._file is not None and record is not None:
            self._file.write(json.dumps({**record, **trainer.vectors}) + "\n")
            self._file.flush()

    def end(self, trainer: Loop, outcome: Outcome | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _keep_until(path: Path, step: int) -> None:
    """Keep only the records up to `step`; a line cut off by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf8")
    os.replace(temporary, path)
