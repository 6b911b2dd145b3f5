"""Collectives: what PyTorch calls them, how many bytes they carry, along which axis they go.

A trace names operations, types and shapes, but on gloo no group. So the step before the recorded
one is watched as it is dispatched, and its messages are found again in the trace by kind, size and
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.layout import AXES, Layout

_resolve: Any = c10d._resolve_process_group  # type: ignore[attr-defined]

KINDS = {
    "all_reduce": ("allreduce", "all_reduce"),
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter", "reducescatter"),
    "all_to_all": ("alltoall", "all_to_all"),
    "broadcast": ("broadcast",),
    "send": ("send",),
    "receive": ("recv",),
    "reduce": ("reduce",),
    "gather": ("gather",),
    "scatter": ("scatter",),
    "barrier": ("barrier",),
}
"""What a message is called here, and how its operation's name begins; longer ones first."""
BYTES = {
    "float": 4, "float32": 4, "double": 8, "float64": 8, "half": 2, "c10::half": 2, "float16": 2,
    "bfloat16": 2, "c10::bfloat16": 2, "int": 4, "int32": 4, "long": 8, "long int": 8, "int64": 8,
    "bool": 1, "byte": 1, "char": 1, "uint8": 1, "int8": 1, "signed char": 1, "unsigned char": 1,
    "short": 2, "int16": 2,
}  # fmt: skip
"""The size of an element, by the names that traces use."""
_OUTPUT_FIRST = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
"""Kinds whose c10d operation takes the result before the input."""


def kind(operation: str) -> str | None:
    """`c10d::allreduce_` → `all_reduce`; None for what sends nothing (`wait_tensor`)."""
    room, _, name = operation.replace(".", "::").partition("::")
    if room not in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return None
    name = name.lstrip("_").lower()
    return next((k for k, begins in KINDS.items() if name.startswith(begins)), None)


def input_index(operation: str) -> int:
    """Which argument of an operation is what this rank gives."""
    return int(operation.startswith("c10d") and kind(operation) in _OUTPUT_FIRST)


def traced_elements(operation: str, arguments: dict[str, Any]) -> int | None:
    """Elements of this rank's input, from a trace with shapes; None where the trace has none."""
    shapes = arguments.get("Input Dims") or []
    index = input_index(operation)
    if len(shapes) <= index:
        return None
    shape = shapes[index]
    nested = bool(shape) and isinstance(shape[0], list)
    return int(sum(math.prod(s) for s in shape) if nested else math.prod(shape))


def traced_bytes(arguments: dict[str, Any]) -> int | None:
    """Bytes of a traced operation's first argument; None if its type or shape is not told."""
    elements = traced_elements("", arguments)
    size = BYTES.get(str((arguments.get("Input type") or [""])[0]).lower())
    return None if elements is None or size is None else elements * size


def axis_of(layout: Layout, ranks: Sequence[int]) -> str | None:
    """The axes on which these ranks differ: `tp`, `replicate×fsdp`; None for a single rank."""
    places = [replace(layout, rank=rank).coordinates for rank in ranks]
    differ = [axis for axis in AXES if len({place[axis] for place in places}) > 1]
    return "×".join(differ) or None


class Axes:
    """The axis of each message of a step, by kind and elements in the order they were sent."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._seen: dict[tuple[str, int], list[str | None]] = {}
        self._taken: dict[tuple[str, int], int] = {}
        used = [axis for axis, place in layout.coordinates.items() if getattr(layout, axis) > 1]
        self._only = used[0] if len(used) == 1 else None

    def saw(self, name: str, elements: int, ranks: Sequence[int]) -> None:
        self._seen.setdefault((name, elements), []).append(axis_of(self.layout, ranks))

    def take(self, name: str, elements: int | None) -> str | None:
        """The axis of the next such message; None where it is not known."""
        if self._only is not None or elements is None:
            return self._only
        known = self._seen.get((name, elements), [])
        index = self._taken.get((name, elements), 0)
        self._taken[name, elements] = index + 1
        if index < len(known):
            return known[index]
        return known[-1] if len(set(known)) == 1 else None


class Watch(TorchDispatchMode):
    """Inside, every message that is dispatched is told to `axes`."""

    def __init__(self, axes: Axes):
        super().__init__()  # type: ignore[no-untyped-call]
        self.axes = axes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = kind(func.name())
        if name is not None:
            ranks = _ranks(args)
            given = args[input_index(func.name())]
            tensors = given if isinstance(given, list | tuple) else [given]
            elements = sum(t.numel() for t in tensors if isinstance(t, Tensor))
            if ranks is not None:
                self.axes.saw(name, elements, ranks)
        return func(*args, **(kwargs or {}))


def _ranks(args: Any) -> list[int] | None:
    """The ranks of the group among an operation's arguments, which it holds or names."""
    for value in args:
        group: Any = None
        if isinstance(value, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(value)
            except RuntimeError:  # the reduction's kind is such an object as well
                continue
        elif isinstance(value, dist.ProcessGroup):
            group = value
        elif isinstance(value, str) and value.isdigit():  # functional collectives name their group
            group = _resolve(value)
        if group is not None:
            return list(dist.get_process_group_ranks(group))
    return None
