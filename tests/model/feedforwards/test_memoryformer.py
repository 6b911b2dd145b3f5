"""Memory layers against brute force over all corners, and the catalogue's checks."""

import itertools

import torch

from model.feedforwards.memoryformer import MemoryFormer, MemoryLayer
from tests.model.reference import agree

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def brute(weight, bias, x, bits):
    """y = b + Σ_k ⟨z, c⟩ softmax(⟨z, ·⟩)_c T_k[c] with c the nearest of all corners."""
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits))).to(x)
    total = bias
    for k in range(weight.shape[0]):
        products = x[..., k * bits : (k + 1) * bits] @ corners.T
        best = products.argmax(-1, keepdim=True)
        score = products.gather(-1, best) * products.softmax(-1).gather(-1, best)
        total = total + score * weight[k][best.squeeze(-1)]
    return total


def formula(p, x):
    h = brute(p["up.weight"], p["up.bias"], x, 4)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = h * p["norm.gain.weight"] + p["norm.bias.weight"]
    return brute(p["down.weight"], p["down.bias"], h, 6)


def test_memoryformer_is_a_search_over_all_corners():
    """Breaks if bits are taken lowest first, or the score leaves out the softmax."""
    agree(MemoryFormer(8, bits=4), formula, X)


def test_within_an_orthant_only_the_score_moves():
    layer = MemoryLayer(1, 4, 5, "column")
    torch.nn.init.zeros_(layer.bias)
    z = torch.tensor([[0.3, -1.0, 2.0, -0.1]])
    near, far = layer(z), layer(z * torch.tensor([2.0, 0.5, 1.0, 30.0]))
    ratio = far / near
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    other = layer(z * torch.tensor([1.0, 1.0, 1.0, -1.0])) / near
    assert (other - other[:, :1]).abs().max() > 0.1


def test_a_large_input_has_the_score_of_its_absolute_sum():
    layer = MemoryLayer(1, 4, 5, "column")
    torch.nn.init.zeros_(layer.bias)
    z = 50 * torch.tensor([[0.3, -1.0, 2.0, -0.5]])
    torch.testing.assert_close(layer(z)[0], z.abs().sum() * layer.weight[0, 0b1010])


def test_a_token_touches_one_row_of_each_table():
    module = MemoryFormer(8, bits=4)
    module(X[:1, :1]).sum().backward()
    for layer in (module.up, module.down):
        touched = layer.weight.grad.abs().sum(-1) > 0
        assert touched.sum(-1).tolist() == [1, 1]
