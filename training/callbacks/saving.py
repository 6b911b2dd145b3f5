"""Checkpoints: when they are written."""

from __future__ import annotations

from checkpoints.store import CheckpointStore
from training.callbacks.base import Callback, Loop, Record
from training.outcome import Outcome


class Saving(Callback):
    """Saves every so many steps, at the end of the run, and before a stop."""

    def __init__(self, store: CheckpointStore, every: int, asynchronous: bool):
        self.store, self.every, self.asynchronous = store, every, asynchronous

    def step(self, trainer: Loop, record: Record | None) -> None:
        if trainer.done or trainer.stopped:
            self._save(trainer, asynchronous=False)
        elif trainer.step % self.every == 0:
            self._save(trainer, asynchronous=self.asynchronous)

    def _save(self, trainer: Loop, asynchronous: bool) -> None:
        extra = {k: v for k, v in trainer.last_record.items() if k.endswith("loss")}
        self.store.save(trainer.step, trainer.state(), extra=extra, asynchronous=asynchronous)
        trainer.announce("save", {"checkpoint": str(self.store.folder)})

    def end(self, trainer: Loop, outcome: Outcome | None) -> None:
        if outcome is not None:
            self.store.wait()
