"""Stop signals: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from training.callbacks.base import Callback, Loop
from training.outcome import Outcome

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TWICE = 1.0
"""Seconds within which a second Ctrl-C is the same one, relayed by the process that started us."""


class StopSignals(Callback):
    """Asks the trainer to stop on SIGINT, SIGTERM and SIGUSR1; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self._former: dict[signal.Signals, Any] = {}
        self._trainer: Loop | None = None
        self._interrupted: float | None = None

    def start(self, trainer: Loop) -> None:
        if threading.current_thread() is threading.main_thread():
            self._trainer = trainer
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def end(self, trainer: Loop, outcome: Outcome | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former, self._trainer, self._interrupted = {}, None, None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > TWICE:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self._trainer.request_stop(signal.Signals(number).name)
