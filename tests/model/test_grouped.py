"""Products of grouped rows against one product an expert."""

import pytest
import torch

from model.grouped import grouped_product


@pytest.mark.parametrize("counts", [[3, 4, 2], [0, 9, 0], [9, 0, 0], [0, 0, 0]])
def test_each_expert_multiplies_its_rows(counts):
    """Breaks if a matrix meets another's rows, or one without rows keeps uninitialised numbers."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        x = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

        def product(x, weight):
            return grouped_product(x, weight, torch.tensor(counts), counts)

        parts = zip(x.split(counts), weight, strict=True)
        torch.testing.assert_close(product(x, weight), torch.cat([a @ w for a, w in parts]))
        assert torch.autograd.gradcheck(product, (x, weight))
        product(x, weight).sum().backward()
        assert weight.grad.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_multiplies_in_its_type():
    x, weight = torch.randn(4, 3), torch.randn(2, 3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_product(x, weight, torch.tensor([1, 3]), [1, 3])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one kernel needs a GPU")
def test_one_kernel_is_the_loop():
    counts = [16, 0, 48, 24]
    x = torch.randn(88, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4, 64, 32, device="cuda", dtype=torch.bfloat16) / 8
    results = []
    for known in (None, counts):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = grouped_product(a, b, torch.tensor(counts, device="cuda"), known)
        (y * y.detach()).sum().backward()
        results.append((y.detach(), a.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
