"""Attention against the formula, one query at a time."""

import math

import pytest
import torch

from core.errors import UserError
from model.mixers.attention import Attention
from model.stream import Stream
from tests.model.reference import agree


def slow(p, x_BTD, heads, kv_heads, causal, window=None, documents=None):
    """Every head and every query by itself."""
    width = p["q.weight"].shape[0] // heads
    out = torch.zeros(*x_BTD.shape[:2], heads * width, dtype=x_BTD.dtype)
    rows = []
    for b in range(x_BTD.shape[0]):
        q, k, v = (x_BTD[b] @ p[f"{n}.weight"].T for n in "qkv")
        columns = []
        for h in range(heads):
            g = h * kv_heads // heads
            qh, kh, vh = (t[:, i * width : (i + 1) * width] for t, i in ((q, h), (k, g), (v, g)))
            queries = []
            for t in range(x_BTD.shape[1]):
                seen = [
                    s
                    for s in range(x_BTD.shape[1])
                    if (not causal or s <= t)
                    and (window is None or abs(s - t) < window)
                    and (documents is None or documents[b, s] == documents[b, t])
                ]
                weights = torch.softmax(kh[seen] @ qh[t] / math.sqrt(width), 0)
                queries.append(weights @ vh[seen])
            columns.append(torch.stack(queries))
        rows.append(torch.cat(columns, 1))
    out = torch.stack(rows)
    return out @ p["out.weight"].T


X = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("window", "packed"), [(None, False), (None, True), (3, False), (3, True)])
def test_attention_is_its_formula(backend, causal, kv_heads, window, packed):
    mixer = Attention(8, causal, heads=4, kv_heads=kv_heads, window=window, backend=backend)
    documents = DOCUMENTS if packed else None
    agree(
        mixer,
        lambda p, x: slow(p, x, 4, kv_heads, causal, window, documents),
        X,
        call=lambda x: mixer(x, Stream(x, documents=documents)),
    )


def test_softcap_bounds_scores():
    mixer = Attention(8, True, heads=2, softcap=1e-6)
    with torch.no_grad():
        ours = mixer(X, Stream(X))
        v = mixer.v(X)
        mean = torch.stack([v[:, : t + 1].mean(1) for t in range(9)], 1)
    torch.testing.assert_close(ours, mixer.out(mean), rtol=1e-4, atol=1e-4)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
    mixer = Attention(8, heads=2, qk_norm={"name": "rmsnorm", "eps": 1e-12})
    before = mixer(X, Stream(X))
    with torch.no_grad():
        mixer.q.weight *= 7
    torch.testing.assert_close(mixer(X, Stream(X)), before)


def test_impossible_heads_are_the_users_mistake():
    with pytest.raises(UserError, match=r"heads \(4\) must be a multiple of kv_heads \(3\)"):
        Attention(8, heads=4, kv_heads=3)
    with pytest.raises(UserError, match=r"dim \(9\) must be a multiple of heads \(4\)"):
        Attention(9, heads=4)
