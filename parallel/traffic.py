"""Every message of a step, counted: which axis, how many bytes.

`Traffic` sees what reaches the process groups, whoever asks for it: leaf operations, FSDP2, DDP,
pipeline schedules, the engine. It reads shapes only, so it counts a run on fake ranks as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.layout import DATA, Layout
from parallel.mesh import Mesh

_resolve: Any = c10d._resolve_process_group  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Message:
    """One collective, or one send.

    axis: the mesh axes it runs over, as `tp` or `fsdp×ep`.
    bytes: the whole tensor: what a gather gives, what a reduction takes, what an exchange holds.
    size: how many ranks take part.
    kept: bytes of an uneven exchange that stay on this rank; None where all get equal shares.
    """

    operation: str
    axis: str
    bytes: int
    size: int
    kept: int | None = None

    @property
    def sent(self) -> float:
        """The least that each rank must send: (n−1)/n of the bytes, twice that to reduce to all."""
        if self.operation == "send":
            return float(self.bytes)
        if self.kept is not None:
            return float(self.bytes - self.kept)
        share = self.bytes * (self.size - 1) / self.size
        return 2 * share if self.operation == "all_reduce" else share


_OPERATIONS: dict[str, tuple[str, int | None]] = {
    # Name of the operator → what it is, and which argument is the whole tensor (None: the result).
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", None),
    "all_gather_into_tensor_out": ("all_gather", None),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "reduce_scatter_tensor_out": ("reduce_scatter", 0),
    "all_to_all_single": ("all_to_all", 0),
    "broadcast": ("broadcast", 0),
    "broadcast_": ("broadcast", 0),
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
    "isend": ("send", 0),
}
_SILENT = {
    "recv_",
    "irecv",
    "recv_any_source_",
    "barrier",
    "wait_tensor",
    "check_for_nan",
    "_wrap_tensor_autograd",
}
"""Counted where they are sent, or without a payload."""
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Traffic(TorchDispatchMode):
    """Inside, every message is written into `messages`.

    Args:
        axes: name of a process group → the axes it joins; others are called `other`.
    """

    def __init__(self, axes: dict[str, str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.axes = axes
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in _NAMESPACES:
            self._note(func, args, result)
        return result

    def _note(self, func: Any, args: Any, result: Any) -> None:
        name = func._schema.name.split("::")[1]
        if name in _SILENT:
            return
        if name not in _OPERATIONS:
            raise TypeError(f"the collective {func} is not counted: add it to {__name__}")
        operation, at = _OPERATIONS[name]
        group = _group(func, args)
        whole = sum(
            t.numel() * t.element_size() for t in _tensors(result if at is None else args[at])
        )
        size = group.size()
        if size > 1 and whole:
            axis = self.axes.get(str(group.group_name), "other")
            kept = _kept(func, args, group, whole)
            self.messages.append(Message(operation, axis, whole, size, kept))

    def by_axis(self) -> dict[str, dict[str, tuple[int, int]]]:
        """axis → operation → (how many, their bytes)."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for message in self.messages:
            held = found.setdefault(message.axis, {})
            count, total = held.get(message.operation, (0, 0))
            held[message.operation] = (count + 1, total + message.bytes)
        return found


def _group(func: Any, args: Any) -> dist.ProcessGroup:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "group_name":
            group: dist.ProcessGroup = _resolve(value) if isinstance(value, str) else value
            return group
        if argument.name == "process_group":
            return dist.ProcessGroup.unbox(value)
    raise TypeError(f"{func} names no process group")


def _kept(func: Any, args: Any, group: dist.ProcessGroup, whole: int) -> int | None:
    """What an exchange with stated shares leaves on this rank."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "input_split_sizes" and value:
            return int(whole * value[group.rank()] / sum(value))
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def group_axes(mesh: Mesh, layout: Layout) -> dict[str, str]:
    """Name of every process group of a mesh → the axes it joins, those of size 1 left out."""

    def joined(axes: tuple[str, ...]) -> str:
        return "×".join(axis for axis in axes if getattr(layout, axis) > 1) or axes[0]

    found = {str(mesh.world.group_name): "world"}
    if mesh.model is not None:
        found[str(mesh.model.group_name)] = joined(("pp", "fsdp", "ep", "cp", "tp"))
    if mesh.data is not None:
        found[str(mesh.data.group_name)] = joined(DATA)
    for shard, axes in ((mesh.shard, ("fsdp", "ep", "cp")), (mesh.expert_shard, ("fsdp", "cp"))):
        found[str(shard.get_group(shard.ndim - 1).group_name)] = joined(axes)
    for axis in mesh.axes.mesh_dim_names or ():
        found[str(mesh.axes.get_group(axis).group_name)] = axis
    return found
