"""Choosing a checkpoint and filling a state from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints import tensors
from checkpoints.errors import CheckpointError
from checkpoints.files import step_folders
from checkpoints.found import Found, scan
from checkpoints.group import Group
from checkpoints.manifest import Manifest
from checkpoints.state import (
    PROGRESS,
    RNG,
    Leaves,
    State,
    check_present,
    check_wanted,
    dtype_name,
)
from core.errors import UserError
from core.log import get_logger

VALUES = "values.json"


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was passed over, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What was loaded."""

    step: int
    path: Path
    manifest: Manifest
    skipped: tuple[Skipped, ...]
    """The newer ones that could not be used."""
    rng: bool
    """Whether `rng` was filled; not where it was saved by another number of ranks."""


def choose(folder: Path, step: int | None) -> list[Found]:
    """The checkpoints to try, newest first: all, or that of `step` alone.

    Raises:
        UserError: there is none.
    """
    steps = list(step_folders(folder))
    if not steps:
        raise UserError(f"{folder}: no checkpoint there")
    if step is None:
        return scan(folder)
    if step not in steps:
        nearest = min(steps, key=lambda other: abs(other - step))
        raise UserError(f"{folder}: no checkpoint of step {step}; the nearest is step {nearest}")
    return [Found(step, step_folders(folder)[step])]


def restore(folder: Path, state: State, step: int | None, group: Group) -> Loaded:
    """Fill `state` in place; a collective. See `CheckpointStore.load`."""
    doing = "loading a checkpoint"
    candidates = group.from_first(lambda: choose(folder, step), doing, folder)
    skipped: list[Skipped] = []
    for found in candidates:
        # Every rank reads its share of the bytes, and one that finds damage tells the others.
        share = (group.rank, group.size)
        flaws = group.gather(lambda: found.verify(share), doing, folder)  # noqa: B023
        reason = group.from_first(lambda: next(filter(None, flaws), None), doing, folder)  # noqa: B023
        if reason is not None:
            skipped.append(Skipped(found.step, reason))
            get_logger().warning("checkpoint of step %d skipped: %s", found.step, reason)
            continue
        assert found.manifest is not None
        rng = _fill(found.path, found.manifest, state, group)
        get_logger().info("loaded step %d from %s", found.step, found.path)
        return Loaded(found.step, found.path, found.manifest, tuple(skipped), rng)
    reasons = "; ".join(f"step {item.step}: {item.reason}" for item in skipped)
    raise CheckpointError(f"{folder}: no checkpoint verifies ({reasons})")


def _fill(path: Path, manifest: Manifest, state: State, group: Group) -> bool:
    wanted = Leaves.of(state, group.rank)
    doing = f"loading step {manifest.step}"
    text = group.from_first(lambda: (path / VALUES).read_text(encoding="utf8"), doing, path)
    saved = json.loads(text)
    values: dict[str, Any] = saved["values"]
    group.gather(lambda: check_present(wanted, manifest.tensors, set(values)), doing, path)
    _check_nothing_left(manifest, values, wanted, group, path)
    rng = _choose_rng(wanted, manifest, group)
    _tell_conversions(wanted, manifest)
    group.gather(lambda: tensors.read(path, wanted.tensors), doing, path)
    for name, slot in wanted.values.items():
        slot.set(values[name])
    if PROGRESS in state:
        state[PROGRESS].clear()
        state[PROGRESS].update(saved[PROGRESS])
    return rng


def _check_nothing_left(
    manifest: Manifest, values: dict[str, Any], wanted: Leaves, group: Group, path: Path
) -> None:
    """A name nobody asks for is a mistake, but a rank need not ask for all of them."""
    names = [*manifest.tensors, *values]
    mine = torch.tensor([name in wanted.tensors or name in wanted.values for name in names])
    taken = group.anywhere(mine.bool()).tolist()
    group.gather(lambda: check_wanted(names, taken, wanted), f"loading step {manifest.step}", path)


def _choose_rng(wanted: Leaves, manifest: Manifest, group: Group) -> bool:
    """Drop from `wanted` the generator states that the checkpoint cannot give; True: none."""
    mine = [name for name in wanted.tensors if name.startswith(f"{RNG}/")]
    if not mine:
        return False
    why = ""
    if manifest.ranks != group.size:
        why = f"saved by {manifest.ranks} processes, now {group.size}"
    elif missing := [n for n in mine if _differs(n, wanted.tensors[n], manifest)]:
        why = f"{missing[0]} is not in the checkpoint in this form"
    if why:
        for name in mine:
            del wanted.tensors[name]
        get_logger().info("random number generators keep their fresh states: %s", why)
    return not why


def _differs(name: str, tensor: torch.Tensor, manifest: Manifest) -> bool:
    record = manifest.tensors.get(name)
    return record is None or record.shape != tuple(tensor.shape)


def _tell_conversions(wanted: Leaves, manifest: Manifest) -> None:
    kinds = {
        (manifest.tensors[name].dtype, dtype_name(tensor.dtype))
        for name, tensor in wanted.tensors.items()
    }
    for saved, now in sorted(kind for kind in kinds if kind[0] != kind[1]):
        get_logger().warning("tensors saved as %s are converted to %s", saved, now)
