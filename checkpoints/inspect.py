"""Reading checkpoints without torch: what `manyforms checkpoint list` and `verify` print."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from checkpoints.files import parse_step, step_folders
from checkpoints.found import Found, scan
from checkpoints.manifest import MANIFEST
from core.errors import UserError, hint


@dataclass(frozen=True)
class Row:
    """One checkpoint, as a table shows it."""

    step: int
    path: Path
    size: int | None
    """Bytes; None where the manifest cannot be read."""
    age: float | None
    """Seconds since it was saved; None where the manifest cannot be read."""
    ranks: int | None
    """How many processes wrote it; None where the manifest cannot be read."""
    flaw: str | None
    """Why it cannot be used; None: nothing wrong was found."""


def rows(place: str | Path, *, verify: bool = False) -> list[Row]:
    """The checkpoints of a run, of a checkpoints folder, or the one of a step folder, by step.

    Args:
        place: any of these three folders.
        verify: read every byte; otherwise only names and sizes are compared.

    Raises:
        UserError: there is no checkpoint.
    """
    folder, step = _locate(Path(place))
    found = [item for item in scan(folder) if step in (None, item.step)]
    return [_row(item, verify) for item in sorted(found, key=lambda item: item.step)]


def _row(found: Found, verify: bool) -> Row:
    manifest = found.manifest
    return Row(
        step=found.step,
        path=found.path,
        size=manifest.size if manifest else None,
        age=max(0.0, time.time() - manifest.saved_at) if manifest else None,
        ranks=manifest.ranks if manifest else None,
        flaw=found.verify() if verify else found.flaw,
    )


def find_checkpoint(place: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint: the newest that looks whole, or that of `step`.

    Args:
        place: a run's folder, its checkpoints folder, or one step's folder.
        step: which; None: the newest.

    Raises:
        UserError: there is none; names the nearest folder or step.
    """
    folder, only = _locate(Path(place))
    if step is None:
        step = only
    elif only not in (None, step):
        raise UserError(f"{place}: is the checkpoint of step {only}, not of step {step}")
    if step is not None:
        steps = step_folders(folder)
        if step not in steps:
            nearest = min(steps, key=lambda other: abs(other - step))
            raise UserError(
                f"{folder}: no checkpoint of step {step}; the nearest is step {nearest}"
            )
        return steps[step]
    found = scan(folder)
    for item in found:
        if item.flaw is None:
            return item.path
    raise UserError(f"{folder}: no checkpoint is whole; step {found[0].step}: {found[0].flaw}")


def _locate(place: Path) -> tuple[Path, int | None]:
    """The checkpoints folder that `place` means, and the step if it means one; never empty."""
    step = parse_step(place.name)
    if step is not None:
        if place.is_dir():
            return place.parent, step
        steps = step_folders(place.parent)
        if steps:
            nearest = min(steps, key=lambda other: abs(other - step))
            raise UserError(f"{place}: no such checkpoint; the nearest is step {nearest}")
    if not place.exists():
        parent = place.parent
        siblings = [path.name for path in parent.iterdir()] if parent.is_dir() else []
        raise UserError(f"{place}: no such folder{hint(place.name, siblings)}")
    if not place.is_dir():
        raise UserError(f"{place}: is a file; give a run's folder or a checkpoint's")
    for folder in (place, place / "checkpoints"):
        if step_folders(folder):
            return folder, None
    if (place / MANIFEST).exists():
        raise UserError(f"{place}: a checkpoint's folder is called step-00000100; name it so")
    raise UserError(f"{place}: no checkpoint there")
