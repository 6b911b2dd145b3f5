"""The callbacks of every run."""

from __future__ import annotations

from pathlib import Path

from checkpoints.config import CheckpointConfig
from checkpoints.store import CheckpointStore
from training.callbacks.base import Callback
from training.callbacks.events_file import EventsFile
from training.callbacks.metrics_file import MetricsFile
from training.callbacks.progress import Progress
from training.callbacks.saving import Saving
from training.callbacks.tensorboard import TensorBoard
from training.summary import Summary


def standard(
    folder: Path | None, store: CheckpointStore | None, checkpoint: CheckpointConfig | None
) -> list[Callback]:
    """Progress, and with a folder its files; saving comes last, after what it seals."""
    callbacks: list[Callback] = [Progress()]
    if folder is not None:
        callbacks += [
            MetricsFile(folder / "metrics.jsonl"),
            EventsFile(folder / "events.jsonl"),
            TensorBoard(folder / "tensorboard"),
            Summary(folder / "summary.json"),
        ]
    if store is not None and checkpoint is not None:
        callbacks.append(Saving(store, checkpoint.every, checkpoint.asynchronous))
    return callbacks
