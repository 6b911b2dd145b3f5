"""One save, from an empty temporary folder to a checkpoint that counts.

Order is everything: tensors, values, their digests in the manifest, all forced to the disk; then
the rename that makes it a checkpoint, the pointer, and only then the pruning of older ones.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints import files, tensors
from checkpoints.errors import CheckpointError, explain
from checkpoints.found import scan
from checkpoints.group import Group
from checkpoints.manifest import FORMAT, MANIFEST, FileRecord, Manifest, TensorRecord, record_files
from checkpoints.restore import VALUES
from checkpoints.retention import prunable
from checkpoints.state import PROGRESS, Leaves, Piece, State
from core.log import get_logger

PHASES = ("begin", "folder", "tensors", "values", "manifest", "aside", "rename", "pointer", "prune")


@dataclass(frozen=True)
class Job:
    """What one rank is to write."""

    step: int
    pieces: dict[str, list[Piece]]
    values: str
    extra: dict[str, Any]
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, step: int, state: State, extra: dict[str, Any], rank: int, copy: bool) -> Job:
        """This rank's share of a state; with `copy`, cut loose from the live tensors."""
        leaves = Leaves.of(state, rank)
        values = {name: slot.value for name, slot in leaves.values.items()}
        pieces = {n: Piece.all_of(n, tensor, copy) for n, tensor in leaves.tensors.items()}
        return cls(
            step,
            {name: held for name, held in pieces.items() if held},
            json.dumps({PROGRESS: dict(state.get(PROGRESS, {})), "values": values}),
            json.loads(json.dumps(extra)),
        )


@dataclass(frozen=True)
class Transaction:
    """How a store saves: where, with whom, and what stays."""

    folder: Path
    group: Group
    keep: int
    keep_every: int
    phase: Callable[[str], object]
    """Called with each of `PHASES` as it is done, on the ranks that take part in it."""

    def run(self, job: Job) -> None:
        """Save; a collective.

        Raises:
            UserError, CheckpointError: on every rank; what was on disk before is still there.
        """
        doing, group = f"saving step {job.step}", self.group
        with ExitStack() as held:
            temporary = group.from_first(lambda: self._begin(job.step, held), doing, self.folder)
            try:
                self.phase("folder")
                written = tensors.write(temporary, job.pieces, group, doing)
                self.phase("tensors")
                sealed = group.gather(
                    lambda: (_seal(temporary, tensors.own_files(temporary, group)), job.values),
                    doing,
                    self.folder,
                )
                group.from_first(
                    lambda: self._commit(temporary, job, written, sealed), doing, self.folder
                )
            except Exception as error:
                if group.first:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise explain(error, doing, self.folder) from error

    def _begin(self, step: int, held: ExitStack) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        locked = held.enter_context(files.lock(self.folder))
        for name in files.clear_leftovers(self.folder, locked):
            get_logger().info("cleared %s, left by an interrupted save", name)
        self.phase("begin")
        temporary = self.folder / f"{files.TEMPORARY}{files.step_name(step)}-{time.time_ns()}"
        temporary.mkdir()
        return temporary

    def _commit(
        self,
        temporary: Path,
        job: Job,
        written: dict[str, TensorRecord],
        sealed: Sequence[tuple[dict[str, FileRecord], str]],
    ) -> None:
        """What one rank does alone: from every rank's sealed files to a checkpoint that counts."""
        files.write_synced(temporary / VALUES, _merge([values for _, values in sealed]))
        records = record_files(temporary, [VALUES])
        for part, _ in sealed:
            records |= part
        for name in records:
            if not (temporary / name).exists():
                raise CheckpointError(
                    f"{temporary / name} cannot be seen by rank 0; all ranks need the same folder"
                )
        self.phase("values")
        before = [found.manifest.sequence for found in scan(self.folder) if found.manifest]
        manifest = Manifest(
            format=FORMAT,
            step=job.step,
            sequence=max(before, default=0) + 1,
            saved_at=time.time(),
            ranks=len(sealed),
            files=dict(sorted(records.items())),
            tensors=written,
            versions={"torch": torch.__version__, "python": platform.python_version()},
            extra=job.extra,
        )
        files.write_synced(temporary / MANIFEST, manifest.write_text())
        files.sync(temporary)
        self.phase("manifest")
        self._publish(temporary, job.step)
        for superfluous in prunable(scan(self.folder), self.keep, self.keep_every):
            files.delete(superfluous.path)
        self.phase("prune")
        seconds = time.monotonic() - job.started
        get_logger().info(
            "saved step %d: %.1f MB in %.1f s", job.step, manifest.size / 1e6, seconds
        )

    def _publish(self, temporary: Path, step: int) -> None:
        final = self.folder / files.step_name(step)
        aside = self.folder / f"{files.REPLACED}{final.name}"
        if final.exists():
            os.rename(final, aside)
            self.phase("aside")
        os.rename(temporary, final)
        files.sync(self.folder)
        self.phase("rename")
        if aside.exists():
            files.delete(aside)
        files.replace_synced(self.folder / files.POINTER, f"{final.name}\n")
        self.phase("pointer")


def _seal(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Force files to the disk and take their digests from there."""
    for name in names:
        files.sync(folder / name)
    return record_files(folder, names)


def _merge(texts: Sequence[str]) -> str:
    """One set of values from those of all ranks: a pipeline stage has only its own."""
    parts = [json.loads(text) for text in texts]
    values = {name: value for part in reversed(parts) for name, value in part["values"].items()}
    whole = {PROGRESS: parts[0][PROGRESS], "values": dict(sorted(values.items()))}
    return json.dumps(whole, indent=1) + "\n"
