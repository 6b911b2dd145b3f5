"""Context parallelism: ranks hold different tokens of a sample, inside sublayers too.

The tokens are cut into 2P chunks for P ranks, and rank r holds chunks r and 2P − 1 − r, so that
under causality every rank has as many keys to see (Brandon et al. 2023, 2311.09431; Dubey et al.
2024, 2407.21783). What each rank makes of its own tokens is a partial sum of every gradient, and
parameters are stored between the ranks of this axis by FSDP2, which sums them.

Axes: B batch, T tokens, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from core.errors import UserError
from model.attention import Backend, Scores, attend
from model.context import Context
from parallel.collectives import Group, all_gather, all_reduce, apply, reduce_scatter
from parallel.heads import HeadsForTokens, TokensForHeads, join
from parallel.ring import Parts, ring_attention


@dataclass(frozen=True)
class Piece:
    """A run of tokens: where it stands in its rank's tokens, and which of all tokens it is."""

    local: slice
    whole: range


def pieces(rank: int, size: int, tokens: int) -> tuple[Piece, Piece]:
    """The two chunks of one rank; `tokens`: how many a rank holds."""
    half = tokens // 2
    assert 2 * half == tokens, "a rank holds two chunks of the same size"
    first, second = rank * half, (2 * size - 1 - rank) * half
    return (
        Piece(slice(0, half), range(first, first + half)),
        Piece(slice(half, tokens), range(second, second + half)),
    )


def natural(x: Tensor, dim: int, size: int) -> Tensor:
    """The ranks' tokens one behind another → their natural order."""
    x = x.unflatten(dim, (size, 2, -1))
    first, second = x.unbind(dim + 1)
    return torch.cat((first, second.flip(dim)), dim).flatten(dim, dim + 1)


def by_rank(x: Tensor, dim: int, size: int) -> Tensor:
    """The inverse of `natural`."""
    x = x.unflatten(dim, (2, size, -1))
    first, second = x.unbind(dim)
    return torch.stack((first, second.flip(dim)), dim + 1).flatten(dim, dim + 2)


class Whole(Function):
    """All tokens in their natural order; backward sums over the ranks and keeps its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return natural(all_gather(x, dim, group), dim, group.size())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ranked = by_rank(grad, ctx.dim, ctx.group.size())
        return reduce_scatter(ranked, ctx.dim, ctx.group), None, None


class Alike(Function):
    """All tokens in their natural order; backward keeps its own of an alike gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, context: RankContext) -> Tensor:
        ctx.dim, ctx.context = dim, context
        return natural(all_gather(x, dim, context.group), dim, context.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.context.own(grad, ctx.dim), None, None


class Mean(Function):
    """The mean over the ranks; backward gives each its share of an alike gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        size = group.size()
        ctx.size = size
        return all_reduce(x, group) / size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.size, None


class RankContext(Context):
    """Several ranks along the context axis.

    Args:
        group: joins them.
        method: how attention sees all keys: ring, heads or gather.
        shares: into how many parts sequence parallelism divides each rank's tokens again.
    """

    def __init__(self, group: Group, method: str, shares: int = 1):
        self.group, self.method, self.shares = group, method, shares
        self.size, self.rank = group.size(), group.rank()

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        check_tokens(x.shape[dim], self.size, self.shares)
        mine = pieces(self.rank, self.size, x.shape[dim] // self.size)
        half = len(mine[0].whole)
        return torch.cat([x.narrow(dim, piece.whole.start, half) for piece in mine], dim)

    def whole(self, x: Tensor, dim: int = 1) -> Tensor:
        return apply(Whole, x, dim, self.group)

    def alike(self, x: Tensor, dim: int = 1) -> Tensor:
        return apply(Alike, x, dim, self)

    def positions(self, x_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
        if positions_BT is None:
            positions_BT = torch.arange(x_BTD.shape[1] * self.size, device=x_BTD.device)[None]
        return self.own(positions_BT)

    def attend(
        self,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        scores: Scores,
        backend: Backend = "auto",
    ) -> Tensor:
        assert scores.bias is None and scores.key_documents is None and scores.first is None
        kind = q_BHTK.device.type
        if torch.is_autocast_enabled(kind):  # a norm over the keys may have widened them
            dtype: torch.dtype = torch.get_autocast_dtype(kind)
            q_BHTK, k_BGTK, v_BGTK = (x.to(dtype) for x in (q_BHTK, k_BGTK, v_BGTK))
        arguments = (q_BHTK, k_BGTK, v_BGTK, scores)
        if self.method == "ring":
            y_BHTK: Tensor = ring_attention(*arguments, self._parts(q_BHTK.shape[2]), self.group)
            return y_BHTK
        if self.method == "heads":
            return self._by_heads(*arguments, backend)
        return self._gathered(*arguments, backend)

    def _parts(self, tokens: int) -> Parts:
        return lambda rank: [(p.local, p.whole) for p in pieces(rank, self.size, tokens)]

    def _by_heads(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, backend: Backend
    ) -> Tensor:
        """Trade tokens for heads, attend, and trade back."""
        joined, held = join(q, k, v, self.size)
        joined = natural(apply(TokensForHeads, joined, self.group), 2, self.size)
        q, k, v = joined.split(held, 1)
        if scores.position is not None:
            per_head = scores.position.per_head.chunk(self.size)[self.rank]
            scores = replace(scores, position=replace(scores.position, per_head=per_head))
        y = by_rank(attend(q, k, v, scores, backend), 2, self.size)
        return apply(HeadsForTokens, y, self.group)

    def _gathered(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, backend: Backend
    ) -> Tensor:
        """Collect all keys and values; each chunk of queries takes those that it may see."""
        width, tokens = k.shape[-1], q.shape[2] * self.size
        k, v = self.whole(torch.cat((k, v), -1), 2).split((width, v.shape[-1]), -1)
        parts = []
        for piece in pieces(self.rank, self.size, q.shape[2]):
            rows, columns = piece.whole, range(piece.whole.stop if scores.causal else tokens)
            own = replace(
                scores,
                first=None if scores.causal else rows.start,
                scratch=scores.scratch.setdefault(f"of chunk {rows}", {}),
                bias=None if (at := scores.position) is None else at.between(rows, columns),
                position=None,
            )
            if scores.documents is not None:
                own.documents = scores.documents[:, rows.start : rows.stop]
                own.key_documents = scores.documents[:, : columns.stop]
            seen = slice(0, columns.stop)
            parts.append(attend(q[:, :, piece.local], k[:, :, seen], v[:, :, seen], own, backend))
        return torch.cat(parts, 2)


def tokens_unit(ranks: int, shares: int = 1) -> int:
    """What the tokens of a sample must be a multiple of: each rank holds two chunks of a size, and
    `shares` ranks divide its tokens again."""
    return ranks * math.lcm(2, shares)


def check_tokens(tokens: int, ranks: int, shares: int = 1) -> None:
    """Whether so many tokens can be divided between the ranks of the context axis.

    Raises:
        UserError: with the nearest number that can.
    """
    unit = tokens_unit(ranks, shares)
    if tokens % unit:
        beside = f", each of them between {shares} by sequence parallelism" if shares > 1 else ""
        raise UserError(
            f"parallel.cp: {tokens} tokens cannot be divided between {ranks} ranks in two chunks "
            f"each{beside}; use a sequence length that is a multiple of {unit}, such as "
            f"{max(1, round(tokens / unit)) * unit}"
        )
