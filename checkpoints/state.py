"""From a state to named tensors and values, and back in place.

A state is a mapping of sections, each a tree of mappings and lists with strings as keys:

    {"model": {"blocks.0.w": tensor}, "optimizer": {"state": {…}, "groups": [{"lr": 0.1}]},
     "progress": {"step": 100, "best": 1.25}, "rng": {"torch": tensor}}

A tensor's logical name is its path, `model/blocks.0.w`; it says nothing of ranks or shards, so
every topology finds every tensor. Two sections are special: `progress` holds values only and is
replaced as a whole; `rng` belongs to each rank alone, so its names carry the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from checkpoints.manifest import TensorRecord
from core.errors import UserError, hint
from core.hashing import stable_hash
from parallel.fragment import Fragment

State = Mapping[str, Any]
PROGRESS, RNG = "progress", "rng"


@dataclass
class Slot:
    """Where in a state a leaf sits: `holder[key]`."""

    holder: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.holder[self.key]

    def set(self, value: Any) -> None:
        """Put a value in, as a tuple where a tuple was: JSON knows only lists."""
        self.holder[self.key] = tuple(value) if isinstance(self.value, tuple) else value


def leaves(tree: Any, name: str) -> Iterator[tuple[str, Slot]]:
    """The leaves below a mapping or list, by logical name: tensors, plain values, lists of these.

    Raises:
        TypeError: a key is not a string, or a leaf is neither a tensor nor plain data.
    """
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"{name}: the key {key!r} is not a string, so it names nothing")
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in items:
        below = f"{name}/{key}"
        if isinstance(value, Mapping) or (isinstance(value, list) and not _plain(value)):
            yield from leaves(value, below)
        elif isinstance(value, torch.Tensor) or _plain(value):
            yield below, Slot(tree, key)
        else:
            raise TypeError(f"{below}: a {type(value).__name__} is neither a tensor nor plain data")


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


@dataclass
class Leaves:
    """A state's leaves by logical name; `tensors` hold the rank in the names of `rng`."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Slot]
    sections: set[str]
    """The sections whose names must match those of a checkpoint exactly."""

    @classmethod
    def of(cls, state: State, rank: int) -> Leaves:
        found = cls({}, {}, set(state) - {PROGRESS, RNG})
        for section, tree in state.items():
            if section == PROGRESS:
                continue
            prefix = f"{RNG}/{rank}" if section == RNG else section
            for name, slot in leaves(tree, prefix):
                if isinstance(slot.value, torch.Tensor):
                    found.tensors[name] = slot.value
                else:
                    found.values[name] = slot
        return found


@dataclass
class Piece:
    """This rank's part of a tensor: `data` stands at `offsets` in a tensor of `shape`."""

    data: torch.Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def all_of(cls, name: str, tensor: torch.Tensor, copy: bool) -> list[Piece]:
        """What this rank writes of a tensor, nothing if others write all of it.

        Of a DTensor's replicas one writes, chosen by the name, so that replicas share the work and
        none copies what it does not write.

        Args:
            name: the logical name.
            tensor: a tensor, which every rank that has the name has whole, a DTensor, or a
                fragment.
            copy: copy to CPU memory, so that later changes of the tensor leave the piece alone.
        """
        shape = tuple(tensor.shape)
        if isinstance(tensor, Fragment):
            held = [(place, data.detach()) for place, data in tensor.parts]
        else:
            local, offsets = tensor.detach(), (0,) * tensor.dim()
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                coordinate = mesh.get_coordinate()
                if coordinate is None:
                    return []
                for axis, placement in enumerate(tensor.placements):
                    assert not placement.is_partial(), f"{name}: a pending sum cannot be saved"
                    writer = stable_hash(name, axis) % mesh.size(axis)
                    if placement.is_replicate() and coordinate[axis] != writer:
                        return []
                (chunk,) = tensor.__create_chunk_list__()
                offsets, local = tuple(chunk.offsets), tensor.to_local().detach()
            held = [(offsets, local)]
        return [cls(_copy(data) if copy else data, place, shape) for place, data in held]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    # Page-locked memory makes the copy several times faster; torch reuses it from save to save.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, …"""
    return str(dtype).removeprefix("torch.")


def check_present(wanted: Leaves, tensors: Mapping[str, TensorRecord], values: set[str]) -> None:
    """Every leaf of a state must be in the checkpoint, with its shape.

    Raises:
        UserError: naming the first that is not, and the nearest name there is.
    """
    for name, tensor in wanted.tensors.items():
        if name.startswith(f"{RNG}/"):
            continue
        if name not in tensors:
            raise UserError(f"the checkpoint has no tensor '{name}'{_near(name, tensors)}")
        if tensors[name].shape != tuple(tensor.shape):
            raise UserError(
                f"tensor '{name}' has shape {list(tensors[name].shape)} in the checkpoint and "
                f"{list(tensor.shape)} in this run; load it with the config it was trained with"
            )
    for name in wanted.values:
        if name not in values:
            raise UserError(f"the checkpoint has no value '{name}'{_near(name, values)}")


def check_wanted(names: list[str], taken: list[bool], wanted: Leaves) -> None:
    """Every name of a checkpoint in the sections of a state must be taken by some rank.

    Raises:
        UserError: naming the first that is not, and the nearest name there is.
    """
    for name, is_taken in zip(names, taken, strict=True):
        if not is_taken and name.split("/", 1)[0] in wanted.sections:
            known = {**wanted.tensors, **wanted.values}
            near = _near(name, known)
            raise UserError(f"this run has no '{name}', which the checkpoint has{near}")


def _near(name: str, known: Any) -> str:
    """The nearest name of the same section."""
    section = name.split("/", 1)[0] + "/"
    return hint(name, (other for other in known if other.startswith(section)))
