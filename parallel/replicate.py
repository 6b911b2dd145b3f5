"""Data parallelism alone: DDP around a model whose every rank holds all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parallel.gradients import sum_over


@torch.no_grad()
def first_reduction(
    model: nn.Module, group: dist.ProcessGroup, device: torch.device
) -> DistributedDataParallel:
    """Sum the first step's gradients here, see which parameters have any, and set DDP up.

    A model may have parts that an objective leaves out, such as the class head in masked modelling;
    DDP looks for them in every step only if there are some.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([float(p.grad is not None) for p in trained], device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    for parameter, anywhere in zip(trained, used.tolist(), strict=True):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_over([p.grad for p in trained if p.grad is not None], group)
    return DistributedDataParallel(
        model,
        process_group=group,
        init_sync=False,  # every rank has computed the same first values
        find_unused_parameters=not bool(used.all()),
        gradient_as_bucket_view=True,
    )
