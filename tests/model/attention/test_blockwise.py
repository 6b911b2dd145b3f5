"""Attention by blocks equals attention at once, in any split and any order.

Axes: B batch, H query heads, G key-value heads, T tokens, K head width.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import model.attention.blockwise as blockwise
from model.attention import Bias, Scores, attend
from model.attention.blockwise import Chance, Gradients, Rows, absorb, unabsorb
from model.positions.alibi import ALiBi
from model.positions.relative_bias import RelativeBias

B, H, T, K = 2, 6, 13, 4


def inputs(kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(heads: int) -> Tensor:
        return torch.randn(B, heads, T, K, generator=generator, dtype=torch.float64)

    q, k, v = noise(H), noise(kv_heads), noise(kv_heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def documents() -> Tensor:
    ids = torch.zeros(B, T, dtype=torch.long)
    ids[0, 5:], ids[1, 9:], ids[1, 11:] = 1, 4, 2
    return ids


def bias(kind: str) -> Bias:
    torch.manual_seed(1)
    position = (ALiBi(H) if kind == "alibi" else RelativeBias(H, causal=True, buckets=4)).double()
    at = torch.arange(T)[None] * 2
    return Bias(position.per_head(), position.form, at, at)


CASES: dict[str, Any] = {
    "plain": lambda: Scores(),
    "causal": lambda: Scores(causal=True),
    "window": lambda: Scores(causal=True, window=3),
    "window on both sides": lambda: Scores(window=2),
    "documents": lambda: Scores(causal=True, documents=documents()),
    "documents both ways": lambda: Scores(documents=documents(), scale=0.3),
    "softcap": lambda: Scores(causal=True, softcap=0.7),
    "alibi": lambda: Scores(causal=True, position=bias("alibi")),
    "relative bias": lambda: Scores(softcap=2.0, window=9, position=bias("relative")),
}


def cuts(seed: int) -> list[range]:
    """A random division of T tokens into blocks, in a random order."""
    draw = random.Random(seed)
    at = [0, *sorted(draw.sample(range(1, T), draw.randint(0, 5))), T]
    blocks = [range(a, b) for a, b in pairwise(at)]
    draw.shuffle(blocks)
    return blocks


def by_blocks(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, seed: int, chance: Chance | None = None
) -> tuple[Tensor, Tensor]:
    """y, and m + log l."""
    y, total = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    for rows in cuts(seed):
        t = slice(rows.start, rows.stop)
        held = Rows.none_seen(q[:, :, t], v, rows)
        for columns in cuts(seed + 100):
            s = slice(columns.start, columns.stop)
            absorb(held, q[:, :, t], k[:, :, s], v[:, :, s], columns, scores, chance)
        y[:, :, t], total[:, :, t] = held.finish()
    return y, total


def gradients_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    total: Tensor,
    dy: Tensor,
    scores: Scores,
    seed: int,
    chance: Chance | None = None,
) -> Gradients:
    zeros = [torch.zeros_like(x) for x in (q, k, v)]
    per_head = None if scores.position is None else torch.zeros_like(scores.position.per_head)
    delta = (y * dy).sum(-1)
    for rows in cuts(seed + 200):
        for columns in cuts(seed + 300):
            t, s = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
            into = Gradients(zeros[0][:, :, t], zeros[1][:, :, s], zeros[2][:, :, s], per_head)
            parts = (q[:, :, t], k[:, :, s], v[:, :, s], dy[:, :, t])
            row_wise = (total[:, :, t], delta[:, :, t])
            unabsorb(into, *parts, *row_wise, rows, columns, scores, chance)
    return Gradients(zeros[0], zeros[1], zeros[2], per_head)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_any_split_equals_the_whole(
    case: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(kv_heads)
    scores = CASES[case]()
    wanted = attend(q, k, v, scores, "reference")
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3)).double()
    per_head = [] if scores.position is None else [scores.position.per_head]
    trained = [x for x in (q, k, v, *per_head) if x.requires_grad]
    gradients = torch.autograd.grad(wanted, trained, dy)
    for seed, tile in enumerate((512, 2, 3)):
        monkeypatch.setattr(blockwise, "TILE", tile)
        scores.scratch.clear()
        with torch.no_grad():
            y, total = by_blocks(q, k, v, scores, seed)
            found = gradients_by_blocks(q, k, v, y, total, dy, scores, seed)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        parts = [found.q, found.k, found.v] + ([found.per_head] if len(trained) == 4 else [])
        for got, right in zip(parts, gradients, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)


def test_queries_that_see_nothing_get_zeros_and_give_no_gradient() -> None:
    """Documents of their own for the first keys, which the first queries alone could see."""
    q, k, v = (x.detach() for x in inputs())
    ids = torch.arange(T).expand(B, T)
    scores = Scores(documents=ids)
    held = Rows.none_seen(q[:, :, :5], v, range(5))
    absorb(held, q[:, :, :5], k[:, :, 3:], v[:, :, 3:], range(3, T), scores)
    y, total = held.finish()
    assert bool((y[:, :, :3] == 0).all()) and bool(torch.isposinf(total[:, :, :3]).all())
    torch.testing.assert_close(y[:, :, 3], v.repeat_interleave(3, 1)[:, :, 3])
    zeros = [torch.zeros_like(x) for x in (q[:, :, :5], k, v)]
    into = Gradients(zeros[0], zeros[1], zeros[2], None)
    dy = torch.ones_like(y)
    delta = (y * dy).sum(-1)
    unabsorb(into, q[:, :, :5], k, v, dy, total, delta, range(5), range(T), scores)
    assert bool((into.v[:, :, :3] == 0).all()) and bool((into.v[:, :, 3:5] == 3).all())
    assert all(bool(x.isfinite().all()) for x in (into.q, into.k, into.v))


def test_what_nobody_sees_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "TILE", 4)
    long = range(16)
    ids = torch.tensor([[0] * 8 + [1] * 8])

    def count(scores: Scores) -> int:
        return len(list(blockwise.tiles(long, long, scores)))

    assert count(Scores()) == 16
    assert count(Scores(causal=True)) == 10
    assert count(Scores(causal=True, window=4)) == 7
    assert count(Scores(window=5)) == 10
    assert count(Scores(documents=ids)) == 8
    assert count(Scores(causal=True, documents=ids)) == 6


def test_dropout_is_the_same_in_both_directions() -> None:
    """Linear in v: y(v + ε) − y(v) is exactly what the gradient of v says, if masks agree."""
    q, k, v = (x.detach() for x in inputs())
    scores, chance = Scores(causal=True), Chance(0.4, 7)
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).double()
    # Tiles are drawn by where they start, so both directions must be cut alike.
    everything = range(T)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = Rows.none_seen(q, v, everything)
        absorb(held, q, k, v, everything, scores, chance)
        return held.finish()

    y, total = forward(q, k, v)
    assert not torch.allclose(y, attend(q, k, v, scores))
    zeros = [torch.zeros_like(x) for x in (q, k, v)]
    into = Gradients(zeros[0], zeros[1], zeros[2], None)
    unabsorb(into, q, k, v, dy, total, (y * dy).sum(-1), everything, everything, scores, chance)
    for at, found in enumerate((into.q, into.k, into.v)):
        step = torch.randn(found.shape, generator=torch.Generator().manual_seed(at)).double() * 1e-5
        moved = [x + step if at == i else x for i, x in enumerate((q, k, v))]
        back = [x - step if at == i else x for i, x in enumerate((q, k, v))]
        difference = ((forward(*moved)[0] - forward(*back)[0]) * dy).sum() / 2
        torch.testing.assert_close((found * step).sum(), difference, rtol=1e-6, atol=1e-12)


def test_dropout_keeps_the_mean() -> None:
    like = torch.zeros(4, 4, 50, 50)
    factor = Chance(0.25, 3).factor(like, range(50), range(50))
    assert factor.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(factor.mean()) == pytest.approx(1, abs=0.02)
    other = replace(Chance(0.25, 3), seed=4).factor(like, range(50), range(50))
    assert not torch.equal(factor, other)
