"""What a callback may do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.outcome import Outcome
    from training.trainer import Trainer

Record = dict[str, float]


class Callback:
    """Called around the loop, on every rank and in the order of the trainer's list.

    A callback that only writes for people does nothing unless `trainer.first`.
    """

    section: str | None = None
    """Where `state` is kept in a checkpoint; None: nothing is kept."""

    def state(self) -> dict[str, Any]:
        """Tensors and values to keep, as a checkpoint holds them; loaded in place."""
        return {}

    def start(self, trainer: Trainer) -> None:
        """Before the first step; after a checkpoint was loaded, if one was."""

    def step(self, trainer: Trainer, record: Record | None) -> None:
        """After each step; `record` is what is logged of it, None between log lines."""

    def event(self, trainer: Trainer, kind: str, facts: dict[str, Any]) -> None:
        """Something rare happened: start, resume, save, stop, failure, end."""

    def end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """After the last step; `outcome` is None when the run failed."""
