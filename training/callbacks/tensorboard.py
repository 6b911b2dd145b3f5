"""TensorBoard: every record's numbers as scalars, its vectors as bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.callbacks.base import Callback, Loop, Record
from training.outcome import Outcome


class TensorBoard(Callback):
    """Writes event files; imported at the first record, because the import takes a second.

    A vector (the load of each expert) is a histogram whose axis counts the entries and whose bars
    are their values, so that the dashboard shows one picture of it over the steps.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer: Any = None

    def step(self, trainer: Loop, record: Record | None) -> None:
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
        values += [
            Summary.Value(tag=name, histo=_bars(vector)) for name, vector in trainer.vectors.items()
        ]
        self._writer.file_writer.add_summary(Summary(value=values), trainer.step)

    def end(self, trainer: Loop, outcome: Outcome | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _bars(vector: list[float]) -> Any:
    """A histogram with a bar from i to i + 1, as high as entry i."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    edges = [float(i + 1) for i in range(len(vector))]
    return HistogramProto(
        min=0.0,
        max=float(len(vector)),
        num=float(sum(vector)),
        # The first bucket reaches down to minus infinity: an empty one before it bounds it by 0.
        bucket_limit=[0.0, *edges],
        bucket=[0.0, *vector],
    )
