"""RoPE against its definition as a complex rotation."""

import pytest
import torch

from model.positions.rope import RoPE


def rotate_slowly(x_BTHK, positions_BT, base, rotated):
    """Pair (i, i + R/2) is a complex number, multiplied by exp(j·position·base^(−2i/R))."""
    out = x_BTHK.clone()
    for i in range(rotated // 2):
        pair = torch.complex(x_BTHK[..., i], x_BTHK[..., i + rotated // 2])
        angle = positions_BT[..., None] * base ** (-2 * i / rotated)
        turned = pair * torch.polar(torch.ones_like(angle), angle)
        out[..., i], out[..., i + rotated // 2] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_is_a_complex_rotation(fraction):
    q, k = torch.randn(2, 2, 9, 3, 8).unbind(0)
    positions = torch.randint(0, 50, (2, 9))
    rope = RoPE(8, base=100.0, fraction=fraction)
    for ours, x in zip(rope.rotate(q, k, positions), (q, k), strict=True):
        slow = rotate_slowly(x, positions.float(), 100.0, int(8 * fraction))
        torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    rope = RoPE(16)

    def score(at_q, at_k):
        turned_q, _ = rope.rotate(q, q, torch.tensor([[at_q]]))
        turned_k, _ = rope.rotate(k, k, torch.tensor([[at_k]]))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-4


def test_without_positions_counts_from_zero():
    q, k = torch.randn(2, 2, 5, 2, 8).unbind(0)
    rope = RoPE(8)
    for ours, slow in zip(
        rope.rotate(q, k, None), rope.rotate(q, k, torch.arange(5).expand(2, 5)), strict=True
    ):
        assert torch.equal(ours, slow)
