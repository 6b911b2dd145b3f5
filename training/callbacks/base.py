"""What a callback may do, and what of the loop it may use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from parallel.engine import Engine
from training.config import TrainConfig
from training.meter import Meter
from training.outcome import Outcome

Record = dict[str, float]


class Loop(Protocol):
    """The trainer, as its callbacks see it."""

    config: TrainConfig
    engine: Engine
    meter: Meter
    seed: int
    first: bool
    """Whether this rank writes."""
    step: int
    """Optimizer steps done."""
    consumed: int
    """Samples of the global order that were read."""
    stopped: str | None
    """The signal to stop on, once all ranks agree on it."""
    counts: dict[str, Any]
    """Parameters and operations of the model."""
    last_record: Record
    vectors: dict[str, list[float]]
    """The last record's metrics with an entry per expert, dimension or layer."""

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        ...

    @property
    def units(self) -> int:
        """Tokens or images that were trained on."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        ...

    def request_stop(self, signal: str) -> None:
        """Stop after this step."""

    def announce(self, kind: str, facts: dict[str, Any]) -> None:
        """Tell every callback of an event."""


class Callback:
    """Called around the loop, on every rank and in the order of the trainer's list.

    A callback that only writes for people does nothing unless `trainer.first`.
    """

    section: str | None = None
    """Where `state` is kept in a checkpoint; None: nothing is kept."""

    def state(self) -> dict[str, Any]:
        """Tensors and values to keep, as a checkpoint holds them; loaded in place."""
        return {}

    def start(self, trainer: Loop) -> None:
        """Before the first step; after a checkpoint was loaded, if one was."""

    def around(self, trainer: Loop, logged: bool) -> AbstractContextManager[Any]:
        """What a step runs in, without its validation and saving; `logged`: it gets a record."""
        return nullcontext()

    def measured(self, trainer: Loop) -> dict[str, Tensor]:
        """After the backward pass of a logged step: what its record is to hold besides.

        Scalars or vectors, alike on every rank; they reach the host together with the loss.
        """
        return {}

    def step(self, trainer: Loop, record: Record | None) -> None:
        """After each step; `record` is what is logged of it, None between log lines."""

    def event(self, trainer: Loop, kind: str, facts: dict[str, Any]) -> None:
        """Something rare happened: start, resume, save, stop, failure, end."""

    def end(self, trainer: Loop, outcome: Outcome | None) -> None:
        """After the last step; `outcome` is None when the run failed."""
