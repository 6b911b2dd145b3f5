"""What passes from one rank to another: a tree of tensors as one flat tensor of each type.

So few messages pass, and nothing that passes is a view, which the schedules that run the backward
pass in two halves would not bear. Both sides must know the border: what is in the tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """A tensor of the tree. `grad`: it carries a gradient back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool


Kind = tuple[torch.dtype, bool]


@dataclass(frozen=True)
class Border:
    """What a tree holds. `like` is such a tree with a `Field` in place of every tensor."""

    like: Any

    @classmethod
    def of(cls, value: Any) -> Border:
        """The border that a value needs; its leaves are tensors and None."""
        return cls(pytree.tree_map(_field, value))

    @cached_property
    def fields(self) -> list[Field | None]:
        return pytree.tree_leaves(self.like)

    @cached_property
    def kinds(self) -> dict[Kind, list[int]]:
        """Type and gradient → which fields travel together, in order."""
        found: dict[Kind, list[int]] = {}
        for index, field in enumerate(self.fields):
            if field is not None:
                found.setdefault((field.dtype, field.grad), []).append(index)
        return found

    def pack(self, value: Any) -> tuple[Tensor, ...]:
        """One flat tensor of each kind.

        Raises:
            AssertionError: if the value is not what the border says.
        """
        found = Border.of(value)
        assert found == self, f"{found.like} comes to a border of {self.like}"
        leaves = pytree.tree_leaves(value)
        return tuple(
            torch.cat(
                [leaves[index].reshape(-1) for index in indices]
            )  # waits for what is in flight
            for indices in self.kinds.values()
        )

    def unpack(self, packed: tuple[Tensor, ...]) -> Any:
        """The value, made of views of what arrived."""
        leaves: list[Tensor | None] = [None] * len(self.fields)
        for flat, indices in zip(packed, self.kinds.values(), strict=True):
            shapes = self._shapes(indices)
            parts = flat.split([math.prod(shape) for shape in shapes])
            for index, part, shape in zip(indices, parts, shapes, strict=True):
                leaves[index] = part.view(shape)
        return pytree.tree_unflatten(leaves, pytree.tree_structure(self.like))

    def room(self, kind: Kind, device: torch.device) -> Tensor:
        """Room for what travels together, or for its gradient."""
        shapes = self._shapes(self.kinds[kind])
        size = sum(math.prod(shape) for shape in shapes)
        return torch.empty(size, dtype=kind[0], device=device)

    def _shapes(self, indices: list[int]) -> list[tuple[int, ...]]:
        held = (self.fields[index] for index in indices)
        return [field.shape for field in held if field is not None]


def _field(tensor: Tensor | None) -> Field | None:
    if tensor is None:
        return None
    return Field(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
