"""The ranks that save and load together, and how they agree that something failed.

A failure on one rank is raised on all of them, with the rank named, so that none waits in a
collective for another that has given up.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from checkpoints.errors import CheckpointError, explain
from core.errors import UserError

T = TypeVar("T")


class Group:
    """All ranks of the job over gloo, apart from the training's groups.

    Saving talks in a background thread while the training's own collectives are under way; on the
    same group the two would mix. Making one is a collective. A job of one process has no group.
    """

    def __init__(self, timeout: timedelta = timedelta(hours=1)):
        self.rank, self.size = 0, 1
        self.handle: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.handle = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def first(self) -> bool:
        """Whether this rank does what only one may do."""
        return self.rank == 0

    def gather(self, function: Callable[[], T], doing: str, folder: Path) -> list[T]:
        """Run `function` on every rank; the first rank gets all results, the others nothing.

        Raises:
            UserError, CheckpointError: on every rank, when it failed on any.
        """
        who = f"rank {self.rank}: " if self.size > 1 else ""
        value, failure = self._attempt(function, doing, folder, who)
        if self.handle is None:
            self._raise([failure])
            assert value is not None or failure is None
            return [value]  # type: ignore[list-item]
        rows: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object((value, failure), rows, dst=0, group=self.handle)
        failures = [row[1] for row in rows] if rows is not None else []
        box = [next((f for f in failures if f is not None), None)]
        dist.broadcast_object_list(box, src=0, group=self.handle)
        self._raise(box)
        return [row[0] for row in rows] if rows is not None else []

    def from_first(self, function: Callable[[], T], doing: str, folder: Path) -> T:
        """Run `function` on the first rank and give every rank its result, or its failure."""
        box: list[Any] = [None]
        if self.first:
            box = [self._attempt(function, doing, folder)]
        if self.handle is not None:
            dist.broadcast_object_list(box, src=0, group=self.handle)
        value, failure = box[0]
        self._raise([failure])
        return value  # type: ignore[no-any-return]

    def anywhere(self, flags: torch.Tensor) -> torch.Tensor:
        """Elementwise, whether any rank has True; `flags` is a bool vector alike on all ranks."""
        if self.handle is None:
            return flags
        marks = flags.to(torch.uint8)
        dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=self.handle)
        return marks.bool()

    @staticmethod
    def _attempt(
        function: Callable[[], T], doing: str, folder: Path, who: str = ""
    ) -> tuple[T | None, tuple[type[Exception], str] | None]:
        try:
            return function(), None
        except Exception as error:
            told = explain(error, doing, folder)
            return None, (type(told), f"{who}{told}")

    @staticmethod
    def _raise(failures: list[tuple[type[Exception], str] | None]) -> None:
        for failure in failures:
            if failure is not None:
                kind, message = failure
                raise (UserError if issubclass(kind, UserError) else CheckpointError)(message)
