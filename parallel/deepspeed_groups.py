"""The process groups that DeepSpeed works on, taken from our mesh.

DeepSpeed sums gradients and divides state over the ranks that hold the same parameters: all axes
but the tensor axis, and for experts all but that and the expert axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from parallel.layout import Layout
from parallel.mesh import Mesh

EXPERTS = "experts"
"""What DeepSpeed calls the group of parameters that the expert axis divides."""


@dataclass(frozen=True)
class Groups:
    """same: the ranks that hold the same of what is no expert; same_experts: of experts.

    tensor, expert: the axes; None where they are 1.
    """

    same: dist.ProcessGroup
    tensor: dist.ProcessGroup | None
    expert: dist.ProcessGroup | None = None
    same_experts: dist.ProcessGroup | None = None


_made: dict[int, tuple[Mesh, Groups]] = {}


def groups_for(mesh: Mesh | None, layout: Layout) -> Groups:
    """The groups, made once for a mesh; a collective."""
    if mesh is None:
        world = dist.group.WORLD
        assert world is not None
        return Groups(world, None)
    held = _made.get(id(mesh))
    if held is None or held[0] is not mesh:
        held = _made[id(mesh)] = (mesh, _make(mesh, layout))
    return held[1]


def _make(mesh: Mesh, layout: Layout) -> Groups:
    def joined(wanted: tuple[str, ...], name: str) -> dist.ProcessGroup:
        present = tuple(axis for axis in wanted if getattr(layout, axis) > 1)
        if len(present) > 1:
            return mesh.axes[present]._flatten(name).get_group()
        return mesh.axes.get_group(present[0] if present else "fsdp")

    alike = layout.cp == 1 and mesh.data is not None
    return Groups(
        mesh.data if alike else joined(("replicate", "fsdp", "ep", "cp"), "zero"),  # type: ignore[arg-type]
        mesh.axes.get_group("tp") if layout.tp > 1 else None,
        mesh.axes.get_group("ep") if layout.ep > 1 else None,
        joined(("replicate", "fsdp", "cp"), "zero_experts") if layout.ep > 1 else None,
    )


class Places:
    """The groups as DeepSpeed asks for them, by the names Megatron gave its own."""

    def __init__(self, groups: Groups):
        self.groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.same

    def get_data_parallel_world_size(self) -> int:
        return self.groups.same.size()

    def get_data_parallel_rank(self) -> int:
        return self.groups.same.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.groups.tensor

    def get_model_parallel_world_size(self) -> int:
        return 1 if self.groups.tensor is None else self.groups.tensor.size()

    def get_model_parallel_rank(self) -> int:
        return 0 if self.groups.tensor is None else self.groups.tensor.rank()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def announce_experts(groups: Groups, parameters: list[nn.Parameter]) -> nn.Module:
    """Tell DeepSpeed which parameters are experts' and what their groups are.

    Returns:
        A module without parameters, by whose type DeepSpeed sees that a model has experts.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as known

    class Experts(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)  # MoE's own would build its layer
            self.num_experts = len(parameters)

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool) -> None:
            known._EXPERT_PARALLEL_GROUP[EXPERTS] = groups.expert
            known._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = groups.same_experts

    for parameter in parameters:
        parameter.allreduce, parameter.group_name = False, EXPERTS  # type: ignore[attr-defined]
    return Experts()
