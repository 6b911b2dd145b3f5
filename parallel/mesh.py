"""The device mesh of a layout, made once for a process group.

PyTorch caches what it derives from a mesh under the mesh's shape, so a second mesh of the same
shape may meet groups of the first that are gone; and groups cost time and sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import AXES, Layout


@dataclass(frozen=True)
class Mesh:
    """`axes` has the dimensions `AXES`; `data` joins the data axes, None if they are 1."""

    world: dist.ProcessGroup
    axes: DeviceMesh
    data: dist.ProcessGroup | None


_made: dict[tuple[str, tuple[int, int, int]], Mesh] = {}


def mesh_for(layout: Layout, device_type: str) -> Mesh:
    """The mesh; making it is a collective."""
    world = dist.group.WORLD
    assert world is not None, "join the job first"
    key = (device_type, layout.shape)
    held = _made.get(key)
    if held is None or held.world is not world:
        axes = init_device_mesh(device_type, layout.shape, mesh_dim_names=AXES)
        several = layout.data_size > 1
        data = axes["replicate", "fsdp"]._flatten("data").get_group() if several else None
        held = _made[key] = Mesh(world, axes, data)
    return held
