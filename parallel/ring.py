"""Ring attention: keys and values pass round the ranks, queries stay (Liu et al. 2023, 2310.01889).

While a rank computes with the keys and values that it holds, the next ones are on their way. In the
backward pass they go round once more, and what the other ranks add to the gradients of each block
travels behind it, one step late, back to where it came from. So memory grows linearly with the
tokens of a rank, and every rank sends (P − 1) blocks forward, and (P − 1) blocks and as many
gradients backward.

Axes: B batch, H query heads, G key-value heads, T tokens of a rank, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.attention.blockwise import Chance, Gradients, Rows, absorb, unabsorb
from model.attention.scores import Scores
from model.precision import at_least_float32
from parallel.collectives import Group, apply, settled

streaming: ContextVar[bool] = ContextVar("streaming", default=False)
"""Whether the forward pass of a ring runs: what it computes is not to be kept tile by tile."""
Parts = Callable[[int], list[tuple[slice, range]]]
"""A rank → where its runs of tokens stand among its own, and which of all tokens they are."""


# Not compiled: its loop follows the documents, which a graph cannot.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, scores: Scores, parts: Parts, group: Group
) -> Tensor:
    """Attention of this rank's queries over all ranks' keys and values, BHTK.

    Args:
        scores: `documents` and `position` are those of all tokens.
        parts: how the tokens are divided.
    """
    chance = None
    if scores.dropout:
        chance = Chance(scores.dropout, int(torch.randint(2**31, ())))
    per_head = None if scores.position is None else scores.position.per_head
    arguments = (q_BHTK, k_BGTK, v_BGTK, per_head, scores, chance, parts, group)
    return apply(RingAttention, *arguments)


class RingAttention(Function):
    """The ring's forward and backward pass; one for each layer."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        per_head: Tensor | None,
        scores: Scores,
        chance: Chance | None,
        parts: Parts,
        group: Group,
    ) -> Tensor:
        scores = _holding(scores, per_head)
        with torch.autocast(q.device.type, enabled=False), _streaming():
            mine = [
                (local, Rows.none_seen(q[:, :, local], v, rows))
                for local, rows in parts(group.rank())
            ]
            for source, k_block, v_block in _round(k, v, group):
                for local, rows in mine:
                    for there, columns in parts(source):
                        k_part, v_part = k_block[:, :, there], v_block[:, :, there]
                        absorb(rows, q[:, :, local], k_part, v_part, columns, scores, chance)
            done = [rows.finish() for _, rows in mine]
            y = torch.cat([y for y, _ in done], 2).to(v.dtype)
            total = torch.cat([total for _, total in done], 2)
        ctx.save_for_backward(q, k, v, per_head, y, total)
        ctx.scores, ctx.chance, ctx.parts, ctx.group = scores, chance, parts, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, per_head, y, total = ctx.saved_tensors
        scores, group = _holding(ctx.scores, per_head), ctx.group
        delta = (at_least_float32(grad) * y).sum(-1)
        trained = per_head is not None and ctx.needs_input_grad[3]
        dq = _zeros(q)
        d_head = torch.zeros_like(per_head) if trained else None
        own = travelling = None
        with torch.autocast(q.device.type, enabled=False):
            for source, k_block, v_block in _round(k, v, group):
                dk, dv = _zeros(k), _zeros(v)
                for local, rows in ctx.parts(group.rank()):
                    for there, columns in ctx.parts(source):
                        into = Gradients(dq[:, :, local], dk[:, :, there], dv[:, :, there], d_head)
                        unabsorb(
                            into,
                            q[:, :, local],
                            k_block[:, :, there],
                            v_block[:, :, there],
                            grad[:, :, local],
                            total[:, :, local],
                            delta[:, :, local],
                            rows,
                            columns,
                            scores,
                            ctx.chance,
                        )
                block = _packed(dk, dv)
                if own is None:
                    own = block  # the first is this rank's, and stays
                    continue
                if travelling is not None:
                    block += settled(travelling)
                travelling = to_next(block, group)
        assert own is not None
        if travelling is not None:
            own += settled(travelling)
        dk, dv = _unpacked(own, k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_head, None, None, None, None


def _holding(scores: Scores, per_head: Tensor | None) -> Scores:
    """The scores with the tensor that autograd saved, not the graph that made it."""
    if scores.position is None or per_head is None:
        return scores
    return replace(scores, position=replace(scores.position, per_head=per_head.detach()))


@contextmanager
def _streaming() -> Iterator[None]:
    token = streaming.set(True)
    try:
        yield
    finally:
        streaming.reset(token)


def _round(k: Tensor, v: Tensor, group: Group) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every rank's keys and values in turn, from this rank's own backwards: (rank, k, v)."""
    size, rank = group.size(), group.rank()
    held = _packed(k, v)
    for step in range(size):
        last = step == size - 1
        following = held if last else to_next(held, group)
        yield (rank - step) % size, *_unpacked(held, k, v)
        held = settled(following)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat((k.reshape(-1), v.reshape(-1)))


def _unpacked(block: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    first, second = block.split((k.numel(), v.numel()))
    return first.view(k.shape), second.view(v.shape)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=at_least_float32(like[:0]).dtype, device=like.device)


def to_next(x: Tensor, group: Group) -> Tensor:
    """The previous rank's x, in flight, while this rank's goes to the next one."""
    size, rank = group.size(), group.rank()
    given, taken = [0] * size, [0] * size
    given[(rank + 1) % size] = taken[(rank - 1) % size] = x.numel()
    arrived: Tensor = functional.all_to_all_single(x, taken, given, group)
    return arrived
