"""Differentiable collectives over one axis: each names its forward and its backward.

What the right backward is depends on whether gradients are alike or partial sums where a value is
used; `parallel/tensor.py` chooses by the rules of `model/operations.py`.

Tensors go through PyTorch's functional collectives, which return at once. Two kinds of results may
stay in flight, so that they travel beside the next computation where nothing reads them at once (in
the ladder residual): what leaves a sublayer, until it is first read, and in the backward pass the
gradient of what entered one, until nothing else is left to compute (`late`). Everything else is
waited for here. A tensor in flight must not enter a compiled function: its gradient would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup

# The names changed in torch 2.13.
_gather: Any = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_scatter: Any = (
    getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
)


def settled(x: Tensor) -> Tensor:
    """The tensor once its collective is done."""
    if isinstance(x, functional.AsyncCollectiveTensor):
        value: Tensor = x.wait()
        return value
    return x


def all_reduce(x: Tensor, group: Group, op: str = "sum", lazy: bool = False) -> Tensor:
    summed: Tensor = functional.all_reduce(x.contiguous(), op, group)
    return summed if lazy else settled(summed)


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """The ranks' parts, concatenated along `dim` in rank order."""
    return settled(_gather(x.contiguous(), dim % x.dim(), group))


def reduce_scatter(x: Tensor, dim: int, group: Group, lazy: bool = False) -> Tensor:
    """This rank's part along `dim` of the sum over ranks."""
    own: Tensor = _scatter(x.contiguous(), "sum", dim % x.dim(), group)
    return own if lazy else settled(own)


def broadcast(x: Tensor, group: Group) -> Tensor:
    """The first rank's tensor, on every rank."""
    return settled(functional.broadcast(x, 0, group))  # 0 counts within the group


def part(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of a tensor that every rank holds; no communication."""
    size = x.shape[dim] // group.size()
    return x.narrow(dim, group.rank() * size, size)


def apply(function: Any, *args: Any) -> Tensor:
    """Call an autograd function; its `apply` is untyped."""
    value: Tensor = function.apply(*args)
    return value


LATER = 8
"""By what `late` divides a node's place in the order of execution.

A branch has more nodes than that, so the order among the late ones stays. An eighth of a node's
number lies before every node of the same step, but for the first step, which may wait too early.
"""


def late(x: Tensor) -> Tensor:
    """The identity; backward settles the gradient, once autograd has nothing else to compute.

    Of the nodes whose gradients are complete, autograd executes the one made last: the norm before
    a branch, made after the previous branch, would be next once this branch is done, and would wait
    for the branch's gradient while the previous branch could compute. A lower place in that order
    changes no dependency, hence no value.
    """
    x = apply(Settle, x)
    node: Any = x.grad_fn
    if node is not None:
        node._set_sequence_nr(node._sequence_nr() // LATER)
    return x


class Settle(Function):
    """The identity; backward waits for a gradient in flight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return settled(grad)


class Copy(Function):
    """The identity; backward sums over the ranks. `lazy`: `late` is to settle the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, lazy: bool = False) -> Tensor:
        ctx.group, ctx.lazy = group, lazy
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad, ctx.group, lazy=ctx.lazy), None, None


class Reduce(Function):
    """Sums over the ranks; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, lazy: bool) -> Tensor:
        return all_reduce(x, group, lazy=lazy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class ReduceBoth(Function):
    """Sums over the ranks, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad, ctx.group), None


class GatherScatter(Function):
    """Concatenates the ranks' parts; backward sums over the ranks and keeps this rank's part.

    `lazy`: `late` is to settle the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, lazy: bool = False) -> Tensor:
        ctx.dim, ctx.group, ctx.lazy = dim, group, lazy
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return reduce_scatter(grad, ctx.dim, ctx.group, ctx.lazy), None, None, None


class GatherPart(Function):
    """Concatenates the ranks' parts; backward keeps this rank's part of an alike gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return part(grad, ctx.dim, ctx.group), None, None


class ScatterGather(Function):
    """Sums over the ranks and keeps this rank's part; backward concatenates the parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, lazy: bool) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group, lazy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(grad, ctx.dim, ctx.group), None, None, None


class Share(Function):
    """The identity; backward gives every rank an equal share of an alike gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.size, None


class VocabCrossEntropy(Function):
    """Negative log-likelihood of rows whose logits are split over the vocabulary.

    Three numbers a row cross the axis: the maximum, the sum of exponentials and the target's logit.
    N rows, V the whole vocabulary, of which this rank holds an equal part.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, ignore: int, group: Group
    ) -> Tensor:
        logits = logits_NV.float()
        top_N = all_reduce(logits.amax(-1), group, "max")
        logits = logits - top_N[:, None]
        own_N = targets_N - group.rank() * logits.shape[-1]
        here_N = (own_N >= 0) & (own_N < logits.shape[-1])
        own_N = own_N.where(here_N, 0)
        target_N = logits.gather(-1, own_N[:, None])[:, 0].where(here_N, 0.0)
        exponentials = logits.exp_()
        sums_2N = all_reduce(torch.stack((exponentials.sum(-1), target_N)), group)
        total_N, target_N = sums_2N[0], sums_2N[1]
        kept_N = targets_N != ignore
        ctx.save_for_backward(exponentials, total_N, own_N, here_N, kept_N)
        ctx.dtype = logits_NV.dtype
        return (total_N.log() - target_N).where(kept_N, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        exponentials, total_N, own_N, here_N, kept_N = ctx.saved_tensors
        grad_N = grad_N.where(kept_N, 0.0)
        grad = exponentials * (grad_N / total_N)[:, None]
        grad.scatter_add_(-1, own_N[:, None], -grad_N.where(here_N, 0.0)[:, None])
        return grad.to(ctx.dtype), None, None, None
