"""Megatron's DistributedDataParallel over the replicas of a model.

It keeps gradients in contiguous fp32 buffers and reduces each bucket while the backward pass goes
on. It knows no DTensor, so it holds a plain twin of each parameter, which shares its memory; leaves
compute with the twins, and a parameter's gradient is laid over its twin's.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.gradients import local
from parallel.megatron_groups import quiet


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """This rank's part under a parameter's layout."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class Buckets:
    """The twins of some parameters, and Megatron's DDP around them.

    Args:
        parameters: those that get a gradient in every step, on every rank.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.twins: dict[Tensor, Tensor] = {
            parameter: nn.Parameter(local(parameter.detach())) for parameter in parameters
        }
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
        # Of a model's config DDP asks one thing: that it sums, since the engine divides.
        with quiet():
            model = TransformerConfig(
                num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=True
            )
        shell = nn.Module()
        shell.held = nn.ParameterList(self.twins.values())
        self.ddp = DistributedDataParallel(model, settings, shell)

    def begin(self) -> None:
        """Empty the buffers for a step."""
        self.ddp.zero_grad_buffer()

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, gradients are reduced if this is the step's last micro-batch."""
        waiting: contextlib.AbstractContextManager[None] = self.ddp.no_sync()
        return contextlib.nullcontext() if last else waiting

    def finish(self) -> None:
        """Wait for the sums and give every parameter its gradient."""
        self.ddp.finish_grad_sync()
        for parameter, twin in self.twins.items():
            parameter.grad = like(parameter, twin.main_grad)  # type: ignore[attr-defined]


@torch.no_grad()
def used(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> list[nn.Parameter]:
    """The parameters that got a gradient on any rank; those that did only elsewhere get zeros."""
    flags = torch.tensor(
        [float(parameter.grad is not None) for parameter in parameters],
        device=local(parameters[0]).device,
    )
    if group is not None:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    found = [p for p, anywhere in zip(parameters, flags.tolist(), strict=True) if anywhere]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return found
