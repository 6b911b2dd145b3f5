"""The checkpoints of a run: every save a transaction, every load verified.

    <folder>/step-00000100/   manifest.json     what there is, with sizes and SHA-256
                              values.json       numbers and strings, floats exact
                              __0_0.distcp …    one file of tensors a rank
                              .metadata         where each tensor's pieces are

Killed at any point, a save leaves the former checkpoints whole. The folder is on a file system
that all ranks share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checkpoints import files
from checkpoints.found import Found, scan
from checkpoints.group import Group
from checkpoints.restore import Loaded, choose, restore
from checkpoints.state import State
from checkpoints.transaction import Job, Transaction


class CheckpointStore:
    """The checkpoints of one run.

    `prepare`, `save`, `wait` and `load` are collectives: every rank of the job calls them alike,
    and a failure on one is raised on all. A `UserError` is something the user can put right, a
    `CheckpointError` a run that failed; either way what was on disk before is still there.

    Args:
        folder: the run's `checkpoints` folder; made when needed.
        keep: how many of the newest checkpoints stay; 0: all.
        keep_every: checkpoints whose step is a multiple of this are never pruned; 0: none such.
        phase: called with the name of each of `transaction.PHASES` when it is done, on the ranks
            that take part in it; for tests that interrupt a save there.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        keep_every: int = 0,
        phase: Callable[[str], object] | None = None,
    ):
        self.folder = Path(folder)
        self._keep, self._keep_every = keep, keep_every
        self._phase = phase or (lambda name: None)
        self._group_made: Group | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def _group(self) -> Group:
        """Made when first needed: making it is a collective, and reading a list is not."""
        if self._group_made is None:
            self._group_made = Group()
        return self._group_made

    def prepare(self) -> None:
        """Make the folder and prove that it can be written, before any work is spent on the run.

        Raises:
            UserError: it cannot.
            CheckpointError: another run is saving into it.
        """
        self._group.from_first(self._prepare, "preparing to save", self.folder)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.lock(self.folder):
            pass

    def save(
        self,
        step: int,
        state: State,
        *,
        extra: dict[str, Any] | None = None,
        asynchronous: bool = False,
    ) -> None:
        """Save `state` as the checkpoint of `step`, replacing the one of that step if there is one.

        Args:
            step: optimizer steps done.
            state: see `checkpoints.state`; `progress` is the first rank's.
            extra: plain data to keep in the manifest.
            asynchronous: return once the state is copied to CPU memory and write it in the
                background. One such save is under way at a time; the next waits for it.

        Raises:
            UserError, CheckpointError: this save failed or, if asynchronous, the one before it.
        """
        group = self._group
        self.wait()
        job = Job.of(step, state, extra or {}, group.rank, copy=asynchronous)
        transaction = Transaction(self.folder, group, self._keep, self._keep_every, self._phase)
        if asynchronous:
            # Not a daemon: a process that ends by itself finishes its save.
            self._thread = threading.Thread(
                target=self._in_background, args=(transaction, job), name=f"checkpoint-{step}"
            )
            self._thread.start()
        else:
            transaction.run(job)

    def _in_background(self, transaction: Transaction, job: Job) -> None:
        try:
            transaction.run(job)
        except BaseException as error:
            self._failure = error

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            UserError, CheckpointError: the save in the background failed; raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def list(self) -> Sequence[Found]:
        """Every checkpoint on disk, by step; their bytes are not read."""
        return sorted(scan(self.folder), key=lambda found: found.step)

    def verify(self, step: int) -> str | None:
        """Why the checkpoint of `step` cannot be used, after reading every byte; None: it is whole.

        Raises:
            UserError: there is none of that step.
        """
        return choose(self.folder, step)[0].verify()

    def load(self, state: State, step: int | None = None) -> Loaded:
        """Fill `state` in place from the newest checkpoint that verifies, or from that of `step`.

        Tensors and DTensors are filled whatever the sharding or number of ranks they were saved
        with. Only the sections that `state` has are read. `rng` is left as it is where the number
        of ranks is another.

        Raises:
            UserError: there is no checkpoint, or it belongs to another model.
            CheckpointError: none verifies.
        """
        self.wait()
        return restore(self.folder, state, step, self._group)
