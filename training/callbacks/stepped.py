"""Tells the parts of a model that live by optimizer steps when one begins or has ended."""

from __future__ import annotations

from typing import Any

from training.callbacks.base import Callback, Loop, Record


class Stepped(Callback):
    """Calls, on every rank and in the order of the model's modules,

    - `begin_step(seed, step)` before step `step` (from 0): what is drawn there is a function of
      the two, so it is alike on all ranks and after a resume;
    - `end_step() -> {parameter's name: what to add to it, whole}` after each step: what is learned
      without gradients. The numbers must be alike on all ranks.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._begins: list[Any] = []
        self._ends: list[Any] = []

    def start(self, trainer: Loop) -> None:
        modules = list(trainer.engine.model.modules())
        self._begins = [m for m in modules if hasattr(m, "begin_step")]
        self._ends = [m for m in modules if hasattr(m, "end_step")]
        self._begin(trainer.step)

    def step(self, trainer: Loop, record: Record | None) -> None:
        for module in self._ends:
            for name, change in module.end_step().items():
                trainer.engine.add(module.get_parameter(name), change)
        self._begin(trainer.step)

    def _begin(self, step: int) -> None:
        for module in self._begins:
            module.begin_step(self.seed, step)
