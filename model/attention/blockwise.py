"""Attention one block of keys at a time: of the score matrix, one tile exists at a time.

For a row of scores that arrives in parts s, with m the largest score so far, l the sum of e^{s−m}
and o that of e^{s−m} v (Milakov and Gimelshein 2018, 1805.02867; Rabe and Staats 2021, 2112.05682):

    m' = max(m, max s),   l' = l e^{m−m'} + Σ e^{s−m'},   o' = o e^{m−m'} + e^{s−m'} v

and in the end y = o / l. A row that sees no key gets zeros. Backward computes each tile's weights
p = e^{s − (m + log l)} again (Dao et al. 2022, 2205.14135): with δ = Σ_K y · dy,

    dv = pᵀ dy,   ds = p (dy vᵀ − δ),   dq = ds k,   dk = dsᵀ q

Nothing here knows of ranks: blocks come in any order, `rows` and `columns` say which of all tokens
their queries and keys are.

Axes: B batch, H query heads, G key-value heads, T queries, S keys, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.scores import Scores
from model.precision import at_least_float32

TILE = 512
"""Queries and keys of the largest tile."""


@dataclass
class Rows:
    """What is known of some queries' softmax, by the keys seen so far.

    rows: which of all tokens the queries are.
    top: BHT, the largest score m. total: BHT, l. out: BHTK, o. All at least float32.
    """

    rows: range
    top: Tensor
    total: Tensor
    out: Tensor

    @classmethod
    def none_seen(cls, q_BHTK: Tensor, v_BGSK: Tensor, rows: range) -> Rows:
        shape, width = q_BHTK.shape[:3], v_BGSK.shape[-1]
        zeros = at_least_float32(q_BHTK.new_zeros(()))
        return cls(
            rows,
            zeros.new_full(shape, -math.inf),
            zeros.new_zeros(shape),
            zeros.new_zeros(*shape, width),
        )

    def finish(self) -> tuple[Tensor, Tensor]:
        """y BHTK, and m + log l BHT: +∞ for a query that saw no key, so that its weights are 0."""
        seen = self.total > 0
        y_BHTK = self.out / self.total.where(seen, 1.0)[..., None]
        return y_BHTK, (self.top + self.total.log()).where(seen, math.inf)


@dataclass(frozen=True)
class Chance:
    """Dropout on the weights, drawn tile by tile so that backward draws the same."""

    rate: float
    seed: int

    def factor(self, like: Tensor, rows: range, columns: range) -> Tensor:
        """0 for what is dropped, 1 / (1 − rate) for the rest."""
        generator = torch.Generator(like.device)
        place = (self.seed * 1_000_003 + rows.start) * 1_000_003 + columns.start
        generator.manual_seed(place % 2**63)
        kept = torch.rand(like.shape, generator=generator, device=like.device) >= self.rate
        return kept.to(like.dtype) / (1 - self.rate)


def absorb(
    held: Rows,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    columns: range,
    scores: Scores,
    chance: Chance | None = None,
) -> None:
    """Let the queries see these keys; `held` is updated in place."""
    for t, s, rows, keys in tiles(held.rows, columns, scores):
        tile = Tile(q_BHTK[:, :, t], k_BGSK[:, :, s], rows, keys, scores)
        top_BHT = torch.maximum(held.top[:, :, t], tile.score.amax(-1))
        safe_BHT = top_BHT.masked_fill(top_BHT == -math.inf, 0.0)
        keep_BHT = (held.top[:, :, t] - safe_BHT).exp()
        p_BHTS = (tile.score - safe_BHT[..., None]).exp()
        held.top[:, :, t] = top_BHT
        held.total[:, :, t] = held.total[:, :, t] * keep_BHT + p_BHTS.sum(-1)
        if chance is not None:
            p_BHTS = p_BHTS * chance.factor(p_BHTS, rows, keys)
        seen_BHTK = over_keys(p_BHTS.to(v_BGSK.dtype), v_BGSK[:, :, s])
        held.out[:, :, t] = held.out[:, :, t] * keep_BHT[..., None] + seen_BHTK


@dataclass
class Gradients:
    """Sums that backward adds to, at least float32: dq BHTK, dk and dv BGSK, and that of what the
    position's bias is made of, or None where that is not trained."""

    q: Tensor
    k: Tensor
    v: Tensor
    per_head: Tensor | None


def unabsorb(
    into: Gradients,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    grad_BHTK: Tensor,
    total_BHT: Tensor,
    delta_BHT: Tensor,
    queries: range,
    columns: range,
    scores: Scores,
    chance: Chance | None = None,
) -> None:
    """The gradients of what these queries saw in these keys, added to `into`.

    grad: that of y. total: m + log l of the finished rows. delta: Σ_K y · dy.
    """
    grad_BHTK = grad_BHTK.to(v_BGSK.dtype)
    for t, s, rows, keys in tiles(queries, columns, scores):
        tile = Tile(q_BHTK[:, :, t], k_BGSK[:, :, s], rows, keys, scores)
        p_BHTS = (tile.score - total_BHT[:, :, t, None]).exp()
        dp_BHTS = at_least_float32(against_keys(grad_BHTK[:, :, t], v_BGSK[:, :, s]))
        seen_BHTS = p_BHTS
        if chance is not None:
            factor = chance.factor(p_BHTS, rows, keys)
            seen_BHTS, dp_BHTS = p_BHTS * factor, dp_BHTS * factor
        into.v[:, :, s] += over_queries(seen_BHTS.to(v_BGSK.dtype), grad_BHTK[:, :, t], v_BGSK)
        ds_BHTS = p_BHTS * (dp_BHTS - delta_BHT[:, :, t, None])
        if into.per_head is not None:
            into.per_head += tile.bias_gradient(ds_BHTS)
        ds_BHTS = tile.product_gradient(ds_BHTS).to(k_BGSK.dtype)
        into.q[:, :, t] += over_keys(ds_BHTS, k_BGSK[:, :, s])
        into.k[:, :, s] += over_queries(ds_BHTS, q_BHTK[:, :, t], k_BGSK)


class Tile:
    """The scores of some queries and some keys, −∞ where a query does not see a key."""

    def __init__(self, q_BHTK: Tensor, k_BGSK: Tensor, rows: range, columns: range, scores: Scores):
        self.scores, self.rows, self.columns = scores, rows, columns
        self.scale = 1 / math.sqrt(q_BHTK.shape[-1]) if scores.scale is None else scores.scale
        s_BHTS = at_least_float32(against_keys(q_BHTK, k_BGSK)) * self.scale
        self.capped: Tensor | None = None
        if scores.softcap is not None:
            self.capped = torch.tanh(s_BHTS / scores.softcap)
            s_BHTS = scores.softcap * self.capped
        if scores.position is not None:
            s_BHTS = s_BHTS + scores.position.between(rows, columns)
        mask = scores.between(rows, columns, q_BHTK.device)
        self.score = s_BHTS if mask is None else s_BHTS.masked_fill(~mask, -math.inf)

    def product_gradient(self, ds_BHTS: Tensor) -> Tensor:
        """The gradient of q·k, from that of the score."""
        if self.capped is not None:
            ds_BHTS = ds_BHTS * (1 - self.capped.square())
        return ds_BHTS * self.scale

    def bias_gradient(self, ds_BHTS: Tensor) -> Tensor:
        """The gradient of what the position's bias is made of."""
        assert self.scores.position is not None
        with torch.enable_grad():
            per_head = self.scores.position.per_head.detach().requires_grad_()
            bias = self.scores.position.between(self.rows, self.columns, per_head)
        (gradient,) = torch.autograd.grad(bias, per_head, ds_BHTS.sum_to_size(bias.shape).to(bias))
        return gradient


def tiles(
    rows: range, columns: range, scores: Scores
) -> Iterator[tuple[slice, slice, range, range]]:
    """The tiles of a block in which anything is seen: their slices of it, and which tokens they
    are."""
    for t in range(0, len(rows), TILE):
        for s in range(0, len(columns), TILE):
            queries, keys = rows[t : t + TILE], columns[s : s + TILE]
            if scores.sees(queries, keys):
                yield slice(t, t + TILE), slice(s, s + TILE), queries, keys


# The products of grouped heads: queries of one group stand one behind another, so that keys and
# values are not repeated.


def against_keys(q_BHTK: Tensor, k_BGSK: Tensor) -> Tensor:
    """q kᵀ, BHTS."""
    groups, (_, heads, queries, _) = k_BGSK.shape[1], q_BHTK.shape
    s: Tensor = q_BHTK.unflatten(1, (groups, -1)).flatten(2, 3) @ k_BGSK.transpose(-1, -2)
    return s.view(-1, heads, queries, k_BGSK.shape[2])


def over_keys(p_BHTS: Tensor, v_BGSK: Tensor) -> Tensor:
    """p v, BHTK."""
    groups, (_, heads, queries, _) = v_BGSK.shape[1], p_BHTS.shape
    y: Tensor = p_BHTS.unflatten(1, (groups, -1)).flatten(2, 3) @ v_BGSK
    return y.view(-1, heads, queries, v_BGSK.shape[-1])


def over_queries(p_BHTS: Tensor, q_BHTK: Tensor, like_BGSK: Tensor) -> Tensor:
    """pᵀ q, summed over the queries and heads of a group, BGSK."""
    groups = like_BGSK.shape[1]
    p, q = (x.unflatten(1, (groups, -1)).flatten(2, 3) for x in (p_BHTS, q_BHTK))
    summed: Tensor = p.transpose(-1, -2) @ q
    return summed
