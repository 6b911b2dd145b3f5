"""A model as a row of steps from stream to stream: what a pipeline cuts between its stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from model.output import Batch
from model.stream import Stream


@dataclass(frozen=True)
class Unit:
    """One step of a model; a pipeline stage begins and ends between two.

    modules: the names of the modules with parameters that it calls.
    run: takes the stream that the step before gave (None: there is none) and the batch, of which
        every stage has a copy.
    """

    modules: tuple[str, ...]
    run: Callable[[Stream | None, Batch], Stream]

    def after(self, first: Callable[[Stream], Stream], modules: tuple[str, ...] = ()) -> Unit:
        """This step with another one before it, not to be cut apart."""
        run = self.run

        def both(stream: Stream | None, batch: Batch) -> Stream:
            assert stream is not None
            return run(first(stream), batch)

        return replace(self, modules=modules + self.modules, run=both)
