"""Polynomial compositions (Zhuo et al. 2024, 2411.03884).

Axes: F hidden channels, R powers; N any leading axes.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from core.registry import register
from model.leaves import Axis, Replicated
from model.precision import at_least_float32

_SOURCE: Any = {
    "paper": "2411.03884",
    "title": "Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models",
}
_Order = Annotated[int, Field(gt=0)]


def coefficients(order: int) -> Replicated:
    """a_0 … a_r: nothing at first but the mean of the powers 1 to r."""

    def first(shape: torch.Size, generator: torch.Generator) -> Tensor:
        value = torch.full(shape, 1 / order)
        value[0] = 0
        return value

    return Replicated(order + 1, fill=first)


@register("activation", "polycom", aliases=["polynorm"], **_SOURCE)
class PolyNorm(nn.Module):
    """PolyNorm: a_0 + Σ_i a_i · x^i / RMS(x^i) over i = 1…r, the mean over all hidden channels.

    Powers are taken in at least float32. It is meant for a feed-forward without a gate; the paper
    reports faster convergence and better accuracy than other activations, and finds this form
    steadier at scale than polyrelu.

    Args:
        order: r, the highest power.
        eps: added to the mean squares.
    """

    def __init__(self, *, order: _Order = 3, eps: Annotated[float, Field(ge=0)] = 1e-6):
        super().__init__()
        self.order, self.eps = order, eps
        self.axis = Axis()
        self.coefficients = coefficients(order)

    def forward(self, x_NF: Tensor) -> Tensor:
        x = at_least_float32(x_NF)
        powers = [x]
        for _ in range(self.order - 1):
            powers.append(powers[-1] * x)
        # The channels are split, so one message sums the squares of all powers.
        squares_NR = torch.stack([power.square().sum(-1) for power in powers], -1)
        channels = x.shape[-1] * self.axis.ops.size
        mean_NR = self.axis.ops.split_sum(squares_NR) / channels
        constant, *factors = self.coefficients().unbind()
        scales_NR = (mean_NR + self.eps).rsqrt() * torch.stack(factors)
        y_NF: Tensor = torch.zeros_like(x) + constant
        for power, scale_N in zip(powers, scales_NR.unbind(-1), strict=True):
            y_NF = torch.addcmul(y_NF, power, scale_N[..., None])
        return y_NF.to(x_NF.dtype)


@register("activation", "polyrelu", **_SOURCE)
class PolyReLU(nn.Module):
    """Σ_i a_i · relu(x)^i over i = 0…r; powers are taken in at least float32.

    Args:
        order: r, the highest power.
    """

    def __init__(self, *, order: _Order = 3):
        super().__init__()
        self.coefficients = coefficients(order)

    def forward(self, x_NF: Tensor) -> Tensor:
        x = at_least_float32(x_NF).relu()
        y_NF = torch.zeros_like(x)
        for factor in reversed(self.coefficients().unbind()):  # Horner's rule
            y_NF = y_NF * x + factor
        return y_NF.to(x_NF.dtype)
