"""ALiBi against the slopes and figures of its paper, and inside attention."""

import math

import pytest
import torch

from model.mixers.attention import Attention
from model.positions.alibi import ALiBi, slopes
from model.roles import roles
from model.stream import Stream
from tests.model.reference import agree


def test_slopes_of_a_power_of_two():
    assert slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert slopes(16)[0] == pytest.approx(2**-0.5)


def test_other_numbers_of_heads_take_every_other_slope_of_the_next_power():
    assert slopes(12)[:8] == slopes(8)
    assert slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert len(slopes(1)) == 1 and len(slopes(7)) == 7


def test_bias_is_linear_in_the_distance_on_both_sides():
    queries, keys = torch.tensor([[0, 1, 2], [4, 5, 0]]), torch.tensor([[0, 1], [3, 9]])
    bias = ALiBi(2).bias(queries, keys)
    assert bias.shape == (2, 2, 3, 2)
    for b in range(2):
        for h, slope in enumerate((2**-4, 2**-8)):
            for t in range(3):
                for s in range(2):
                    assert bias[b, h, t, s] == -slope * abs(queries[b, t] - keys[b, s])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_in_attention(causal, backend):
    def formula(p, x_BTD):
        q, k, v = ((x_BTD @ p[f"{n}.weight"].T).unflatten(-1, (3, 2)) for n in "qkv")
        out = torch.zeros_like(q)
        for h in range(3):
            s = q[:, :, h] @ k[:, :, h].mT / math.sqrt(2)
            for t in range(63):
                for u in range(63):
                    off = u > t and causal
                    shift = -math.inf if off else -slopes(3)[h] * abs(t - u)
                    add = torch.zeros_like(s)
                    add[:, t, u] = shift
                    s = s + add
            out[:, :, h] = s.softmax(-1) @ v[:, :, h]
        return out.flatten(2) @ p["out.weight"].T

    mixer = Attention(6, causal, "alibi", heads=3, backend=backend)
    x = torch.randn(2, 63, 6)
    # Slopes are held in float32 by every model; in float64 they are widened, not recomputed.
    agree(mixer, formula, x, call=lambda x: mixer(x, Stream(x)), tolerance=1e-6)


def test_slopes_shard_with_the_heads_and_are_not_trained():
    position = ALiBi(4)
    assert not position.slopes.weight.requires_grad
    assert roles(position)["slopes.weight"].split == 0
