"""T5's relative bias against a bucket function written out, and against transformers'."""

import math

import pytest
import torch

from core.errors import UserError
from model.mixers.attention import Attention
from model.positions.relative_bias import RelativeBias, bucket
from model.stream import Stream
from tests.model.reference import agree
from tests.references import import_transformers


def slow_bucket(offset, buckets, furthest, causal):
    first = 0
    if causal:
        distance = max(-offset, 0)
    else:
        buckets //= 2
        first = buckets if offset > 0 else 0
        distance = abs(offset)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    grown = int(math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact))
    return first + min(exact + grown, buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 30)])
def test_buckets(causal, buckets, furthest):
    offsets = torch.arange(-300, 301)
    slow = [slow_bucket(o, buckets, furthest, causal) for o in offsets.tolist()]
    ours = bucket(offsets, buckets, furthest, causal)
    # At exact powers the float32 logarithm may fall to the other side; nowhere else.
    assert (ours - torch.tensor(slow)).abs().sum() <= 2
    t5 = import_transformers("transformers.models.t5.modeling_t5")
    theirs = t5.T5Attention._relative_position_bucket(
        offsets, bidirectional=not causal, num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_in_attention(causal, backend):
    def formula(p, x_BTD):
        q, k, v = ((x_BTD @ p[f"{n}.weight"].T).unflatten(-1, (3, 2)) for n in "qkv")
        columns = []
        for h in range(3):
            rows = []
            for t in range(63):
                seen = range(t + 1) if causal else range(63)
                bias = torch.stack(
                    [p["position.table.weight"][h, slow_bucket(s - t, 8, 30, causal)] for s in seen]
                )
                s = torch.einsum("bk,bsk->bs", q[:, t, h], k[:, : len(seen), h]) / math.sqrt(2)
                weights = (s + bias).softmax(-1)
                rows.append(torch.einsum("bs,bsk->bk", weights, v[:, : len(seen), h]))
            columns.append(torch.stack(rows, 1))
        return torch.cat(columns, -1) @ p["out.weight"].T

    spec = {"name": "relative_bias", "buckets": 8, "furthest": 30}
    mixer = Attention(6, causal, spec, heads=3, backend=backend)
    x = torch.randn(2, 63, 6)
    agree(mixer, formula, x, call=lambda x: mixer(x, Stream(x)))


def test_impossible_buckets_are_the_users_mistake():
    with pytest.raises(UserError, match=r"furthest \(16\) must be above half the buckets \(32\)"):
        RelativeBias(2, furthest=16)
