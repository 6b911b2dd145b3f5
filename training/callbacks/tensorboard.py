"""TensorBoard: every record's numbers as scalars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.callbacks.base import Callback, Record

if TYPE_CHECKING:
    from training.outcome import Outcome
    from training.trainer import Trainer


class TensorBoard(Callback):
    """Writes event files; imported at the first record, because the import takes a second."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer: Any = None

    def step(self, trainer: Trainer, record: Record | None) -> None:
        if not trainer.first or record is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What a former part of the run wrote past this step is hidden.
            self._writer = SummaryWriter(str(self.folder), purge_step=trainer.step)
        # One event for all values: a call of add_scalar for each costs several times as much.
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step"
        ]
        self._writer.file_writer.add_summary(Summary(value=values), trainer.step)

    def end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
