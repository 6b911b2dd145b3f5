"""The device mesh of a layout, made once for a process group.

PyTorch caches what it derives from a mesh under the mesh's shape, so a second mesh of the same
shape may meet groups of the first that are gone; and groups cost time and sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import AXES, DATA, Layout

_ALWAYS = ("replicate", "fsdp", "tp")


@dataclass(frozen=True)
class Mesh:
    """`axes` has the dimensions of `AXES` that are in use.

    data: joins the axes that split the batch; None if they are 1.
    model: joins all axes but `replicate`: together these ranks hold one model.
    shard, expert_shard: what FSDP divides parameters over, (replicate, shards) or (shards,).
    """

    world: dist.ProcessGroup
    axes: DeviceMesh
    data: dist.ProcessGroup | None
    model: dist.ProcessGroup | None
    shard: DeviceMesh
    expert_shard: DeviceMesh


_made: dict[tuple[str, tuple[int, ...]], Mesh] = {}


def mesh_for(layout: Layout, device_type: str) -> Mesh:
    """The mesh; making it is a collective."""
    world = dist.group.WORLD
    assert world is not None, "join the job first"
    key = (device_type, layout.shape)
    held = _made.get(key)
    if held is None or held.world is not world:
        held = _made[key] = _make(layout, device_type, world)
    return held


def _make(layout: Layout, device_type: str, world: dist.ProcessGroup) -> Mesh:
    names = [axis for axis in AXES if axis in _ALWAYS or getattr(layout, axis) > 1]
    sizes = [getattr(layout, axis) for axis in names]
    axes = init_device_mesh(device_type, tuple(sizes), mesh_dim_names=tuple(names))

    def joined(wanted: tuple[str, ...], name: str) -> DeviceMesh:
        present = tuple(axis for axis in wanted if axis in names)
        return axes[present[0]] if len(present) == 1 else axes[present]._flatten(name)

    def sharding(wanted: tuple[str, ...], name: str) -> DeviceMesh:
        shards = joined(wanted, name)
        if layout.replicate == 1:
            return shards
        return DeviceMesh._concatenate([axes["replicate"], shards])

    held = tuple(axis for axis in names if axis != "replicate")
    shard = sharding(("fsdp", "ep", "cp"), "shard")
    return Mesh(
        world,
        axes,
        joined(DATA, "data").get_group() if layout.data_size > 1 else None,
        joined(held, "model").get_group() if layout.world > layout.replicate else None,
        shard,
        shard if layout.ep == 1 else sharding(("fsdp", "cp"), "expert_shard"),
    )
