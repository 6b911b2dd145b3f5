"""The file operations that a transaction is made of, and the names in a checkpoints folder.

    step-00000100/             a finished checkpoint
    latest                     the name of the one saved last, for people and scripts
    .tmp-step-00000100/        one that is being written, or was when its process died
    .tmp-pruned-…/             one that is being deleted
    .old-step-00000100/        the former checkpoint of a step while that step is saved again
    .lock                      held (a POSIX record lock) by the process that is saving

A rename is the only operation that makes or unmakes a checkpoint, so at every instant a folder
named `step-…` is whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.errors import CheckpointError

TEMPORARY, REPLACED, POINTER, LOCK = ".tmp-", ".old-", "latest", ".lock"
_STEP = re.compile(r"step-(\d{8,})")
_DAY = 24 * 3600.0


def step_name(step: int) -> str:
    """The folder name of a step: `step-00000100`."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a finished checkpoint's folder name, None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def step_folders(folder: Path) -> dict[int, Path]:
    """Every finished checkpoint by step, ascending.

    A step whose replacement never arrived (killed between the two renames) is found under the
    name it was put aside with.
    """
    found: dict[int, Path] = {}
    if folder.is_dir():
        for path in folder.iterdir():
            step = parse_step(path.name.removeprefix(REPLACED))
            if step is not None and path.is_dir():
                if step in found and path.name.startswith(REPLACED):
                    continue
                found[step] = path
    return dict(sorted(found.items()))


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    """Write a whole text file and force it to the disk."""
    with open(path, "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, text: str) -> None:
    """Put new text in a file so that a reader, or a crash, sees either the old or the new."""
    beside = path.with_name(f"{TEMPORARY}{path.name}")
    write_synced(beside, text)
    os.replace(beside, path)
    sync(path.parent)


def delete(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever taken for one."""
    aside = path.with_name(f"{TEMPORARY}pruned-{path.name.lstrip('.')}-{time.time_ns()}")
    os.rename(path, aside)
    shutil.rmtree(aside)


def clear_leftovers(folder: Path, locked: bool) -> list[str]:
    """Remove what dead processes left, and put back a checkpoint they had put aside.

    Under the lock nobody else is saving, so whatever is temporary is dead. Where the file system
    has no locks, only what nobody touched for a day is taken for dead.

    Returns:
        The names of what was removed or put back.
    """
    done: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(TEMPORARY):
            if locked or time.time() - path.stat().st_mtime > _DAY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                done.append(path.name)
        elif path.name.startswith(REPLACED):
            home = folder / path.name.removeprefix(REPLACED)
            if home.exists():
                delete(path)
            else:
                os.rename(path, home)
                sync(folder)
            done.append(path.name)
    return done


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, so that two runs never save into it at once.

    The kernel drops a record lock when its process dies, and forked children do not inherit it,
    so a lock never outlives the save. Yields False where the file system has no locks.

    Raises:
        CheckpointError: another process holds it.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    f"{folder}: another process is saving checkpoints there; two runs cannot "
                    f"share a folder"
                ) from None
            held = False
        yield held
    finally:
        os.close(handle)
