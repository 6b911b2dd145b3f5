"""summary.json: what a run came to, in one file."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.callbacks.base import Callback, Loop
from training.outcome import Outcome


class Summary(Callback):
    """Writes the summary when the run ends or is stopped; a failed run keeps its former one."""

    def __init__(self, path: Path):
        self.path = path

    def end(self, trainer: Loop, outcome: Outcome | None) -> None:
        if trainer.first and outcome is not None:
            text = json.dumps(summary(trainer, outcome), indent=1) + "\n"
            temporary = self.path.with_name(f"{self.path.name}.tmp")
            temporary.write_text(text, encoding="utf8")
            os.replace(temporary, self.path)


def summary(trainer: Loop, outcome: Outcome) -> dict[str, Any]:
    """Final metrics, parameter and FLOP counts, versions, seed, wall time in seconds."""
    return {
        "step": outcome.step,
        "stopped": outcome.stopped,
        "metrics": outcome.metrics,
        "validation": outcome.validation,
        trainer.meter.unit: trainer.units,
        "samples": trainer.consumed,
        "seconds": outcome.seconds,
        "seed": trainer.seed,
        "counts": trainer.counts,
        "device": _device(trainer.engine.device),
        "data_ranks": trainer.engine.data_size,
        "versions": versions(),
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["manyforms"] = version("manyforms")
    except PackageNotFoundError:  # used from a source folder, without installation
        found["manyforms"] = "source"
    return found
