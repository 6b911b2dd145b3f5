"""No normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from core.registry import register


@register("norm", "none", aliases=["identity"])
class NoNorm(nn.Module):
    """The identity."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD
