"""Comparing a mechanism with its slow reference: outputs and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from evaluation.contracts.probe import stir


def agree(
    module: nn.Module,
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    call: Callable[..., Tensor] | None = None,
    tolerance: float = 1e-10,
) -> None:
    """Assert that `module(*inputs)` and `reference(parameters, *inputs)` agree, gradients too.

    `parameters` is the module's named parameters as a dict, moved off their first values.
    """
    module = module.double()
    stir(module, 1)
    call = call or module
    results = []
    for compute in (call, lambda *x: reference(dict(module.named_parameters()), *x)):
        module.zero_grad()
        copies = [x.double().clone().requires_grad_() for x in inputs]
        out = compute(*copies)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).double()
        (out * weights).sum().backward()
        gradients = [x.grad for x in copies] + [p.grad for p in module.parameters()]
        results.append((out, [g.clone() for g in gradients if g is not None]))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert len(our_gradients) == len(their_gradients)
    for a, b in zip([ours, *our_gradients], [theirs, *their_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
