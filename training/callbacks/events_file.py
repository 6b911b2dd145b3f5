"""events.jsonl: starts, saves, stops, failures; append-only over the restarts of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from training.callbacks.base import Callback, Loop


class EventsFile(Callback):
    """Appends one object an event: `time` in seconds since 1970, `event`, `step`, and its facts."""

    def __init__(self, path: Path):
        self.path = path

    def event(self, trainer: Loop, kind: str, facts: dict[str, Any]) -> None:
        if trainer.first:
            line = {"time": time.time(), "event": kind, "step": trainer.step, **facts}
            with open(self.path, "a", encoding="utf8") as file:
                file.write(json.dumps(line) + "\n")
