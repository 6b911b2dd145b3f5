"""What a trace counts, against arithmetic on paper."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launcher.plans.trace import Trace


def test_products_are_counted() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    with Trace({}) as trace:
        _ = (a @ b) + 1.0
    assert trace.flops == 2 * 3 * 5 * 7
    assert trace.products == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert trace.touched == trace.products + 2 * 4 * 3 * 7


def test_attention_of_the_cpu_is_counted() -> None:
    q = torch.zeros(2, 4, 32, 16, requires_grad=True)
    with Trace({}) as trace:
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        forward = trace.flops
        y.sum().backward()
    scores = 2 * 2 * 4 * 32 * 32 * 16
    assert forward == 2 * scores
    # Five products backward: the scores again, and the gradients of v, of the scores, of q, of k.
    assert trace.flops - forward == 5 * scores


def test_memory_is_what_is_alive() -> None:
    with Trace({}) as trace:
        a = torch.zeros(1000)
        view = a[:10]
        assert trace.live == trace.peak == 4000
        b = a + 1
        assert trace.live == 8000
        del a
        assert trace.live == 8000, "a view keeps its storage"
        del view, b
        assert (trace.live, trace.peak) == (0, 8000)


def test_a_storage_that_is_resized_is_counted_at_its_size() -> None:
    with Trace({}) as trace:
        a = torch.zeros(1000)
        a.untyped_storage().resize_(0)
        assert trace.live == 0
        a.untyped_storage().resize_(4000)
        assert trace.live == trace.peak == 4000


def test_fake_tensors_count_like_real_ones() -> None:
    found = []
    for mode in (None, FakeTensorMode()):
        if mode is not None:
            mode.__enter__()
        weight = torch.zeros(64, 64, requires_grad=True)
        with Trace({}) as trace:
            (torch.zeros(8, 64) @ weight).relu().sum().backward()
        found.append((trace.flops, trace.touched, trace.peak))
        if mode is not None:
            mode.__exit__(None, None, None)
    assert found[0] == found[1]
