"""Tokens traded for heads: attention on all tokens of some heads (Ulysses, Jacobs et al. 2023,
2309.14509).

Each rank comes with its tokens of all heads and leaves with all tokens of its heads, by one
all-to-all for queries, keys and values together; the outputs go back by another.

Axes: B batch, H query heads, G key-value heads, T tokens, K head width, P ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function

from parallel.collectives import Group, settled


def exchange(x_PN: Tensor, group: Group) -> Tensor:
    """Row p goes to rank p, and the row of rank p comes in its place."""
    return settled(functional.all_to_all_single(x_PN.contiguous(), None, None, group))


class TokensForHeads(Function):
    """[B, P heads, T, K] with this rank's tokens → [B, heads, P T, K], ranks' tokens in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return heads_in(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tokens_in(grad, ctx.group), None


class HeadsForTokens(Function):
    """The inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tokens_in(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return heads_in(grad, ctx.group), None


def heads_in(x: Tensor, group: Group) -> Tensor:
    """Give away the other ranks' heads, take in the other ranks' tokens."""
    x = x.unflatten(1, (group.size(), -1)).movedim(1, 0)
    return exchange(x, group).movedim(0, 2).flatten(2, 3)


def tokens_in(x: Tensor, group: Group) -> Tensor:
    """Give away the other ranks' tokens, take in the other ranks' heads."""
    x = x.unflatten(2, (group.size(), -1)).movedim(2, 0)
    return exchange(x, group).movedim(0, 1).flatten(1, 2)


def for_each_rank(x_BGTK: Tensor, ranks: int) -> Tensor:
    """Key-value heads repeated where they are fewer than the ranks, so that each has its own."""
    groups = x_BGTK.shape[1]
    return x_BGTK if groups >= ranks else x_BGTK.repeat_interleave(ranks // groups, 1)


def divides(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether so many heads can be divided between the ranks."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def join(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> tuple[Tensor, list[int]]:
    """Each rank's heads of q, k and v side by side, for one message; how many are of which."""
    assert q.shape[-1] == v.shape[-1], "heads of one width"
    every = (q, for_each_rank(k, ranks), for_each_rank(v, ranks))
    parts = [x.unflatten(1, (ranks, -1)) for x in every]
    return torch.cat(parts, 2).flatten(1, 2), [part.shape[2] for part in parts]
