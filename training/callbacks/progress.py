"""What a person watches: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import IO, Any

from core.log import get_logger
from training.callbacks.base import Callback, Loop, Record
from training.outcome import Outcome

BETWEEN_LINES = 10.0
"""Seconds between two plain lines; the first and the last step and validations always show."""
BETWEEN_FRAMES = 0.1
"""Seconds between two updates of the bar."""


def duration(seconds: float) -> str:
    """1:05, or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(number: float) -> str:
    """1.2k, 3.45M: three digits."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


class Progress(Callback):
    """Loss, speed and the time left.

    Args:
        stream: where a bar would be drawn; it is, if this is a terminal.
    """

    def __init__(self, stream: IO[str] | None = None):
        self.stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._shown = 0.0
        self._marks: list[tuple[float, int]] = []

    def start(self, trainer: Loop) -> None:
        self._marks = [(time.monotonic(), trainer.step)]
        if not trainer.first or not self.stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(file=self.stream),
            auto_refresh=False,  # a thread that redraws would take time from the training
        )
        self._bar.start()
        self._task = self._bar.add_task(
            "", total=trainer.config.steps, completed=trainer.step, facts=""
        )

    def step(self, trainer: Loop, record: Record | None) -> None:
        if not trainer.first:
            return
        now = time.monotonic()
        weighty = trainer.done or (record is not None and "val/loss" in record)
        wait = BETWEEN_FRAMES if self._bar is not None else BETWEEN_LINES
        if (now - self._shown < wait and not weighty) or not trainer.last_record:
            return
        self._shown = now
        self._marks = [*self._marks[-20:], (now, trainer.step)]
        facts = self._facts(trainer)
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.step, facts=facts, refresh=True)
        else:
            get_logger().info("step %d/%d  %s", trainer.step, trainer.config.steps, facts)

    def _facts(self, trainer: Loop) -> str:
        record = trainer.last_record
        parts = [f"loss {record['loss']:.4f}"]
        for name, label in (
            ("val/loss", "held-out {:.4f}"),
            ("val/bits_per_byte", "{:.4f} bits/byte"),
            ("val/accuracy", "accuracy {:.2%}"),
        ):
            if name in record:
                parts.append(label.format(record[name]))
        rate = record.get(f"{trainer.meter.unit}_per_second", 0.0)
        parts.append(f"{short(rate)} {trainer.meter.unit}/s")
        # Over the last marks, so that the time left includes validation and saving.
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step > first_step and not trainer.done:
            each = (last_time - first_time) / (last_step - first_step)
            parts.append(f"{duration(each * (trainer.config.steps - last_step))} left")
        return "  ".join(parts)

    def end(self, trainer: Loop, outcome: Outcome | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
