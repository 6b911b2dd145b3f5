"""From a model on the meta device to this rank's shards of it, filled with first values."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from core.registry import build
from model.init import Scheme, first_value
from model.leaves import leaves
from model.roles import Role, roles
from parallel.gradients import local
from parallel.layout import Layout
from parallel.recompute import blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split_tensor(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every parameter, still on the meta device, a DTensor on the tensor axis."""
    for _, leaf in leaves(model):
        for name, role in leaf.roles.items():
            whole: nn.Parameter = getattr(leaf, name)
            shape = list(whole.shape)
            placement: Shard | Replicate = Replicate()
            if role.split is not None:
                placement = Shard(role.split)
                shape[role.split] //= mesh.size()
            part = torch.empty(shape, dtype=whole.dtype, device="meta")
            value = DTensor.from_local(
                part, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            setattr(leaf, name, nn.Parameter(value, requires_grad=whole.requires_grad))


def split_data(model: nn.Module, mesh: DeviceMesh, bf16: bool, keep_gathered: bool) -> None:
    """FSDP2 over each block and the rest, on the mesh (replicate, fsdp).

    In bf16 the blocks' parameters are gathered in bf16; gradients are reduced in fp32. What is
    outside the blocks stays fp32, so that the stream is fp32 as on one process.
    """
    block_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks(model):
        fully_shard(
            block, mesh=mesh, mp_policy=block_policy, reshard_after_forward=not keep_gathered
        )
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, on every backend; the engine divides by the global count.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # It warns of updates in place, which nobody makes to a model's losses.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def local_part(whole: Tensor, role: Role, layout: Layout) -> Tensor:
    """This rank's part of a parameter: first the tensor axis, then FSDP's rows of axis 0."""
    if layout.tp > 1 and role.split is not None:
        size = whole.shape[role.split] // layout.tp
        whole = whole.narrow(role.split, layout.tp_rank * size, size)
    if layout.fsdp > 1:
        rows = whole.chunk(layout.fsdp)
        at = layout.coordinates["fsdp"]
        whole = rows[at] if at < len(rows) else whole[:0]
    return whole


@torch.no_grad()
def fill(model: nn.Module, layout: Layout, seed: int) -> None:
    """First values, each a function of the seed and the parameter's logical name."""
    scheme: Scheme = build("init", getattr(model, "init", "normal"))
    depth = int(getattr(model, "depth", 0))
    known = roles(model)
    for name, parameter in model.named_parameters():
        whole = first_value(name, parameter.shape, known[name], scheme, depth, seed)
        local(parameter).copy_(local_part(whole, known[name], layout))
