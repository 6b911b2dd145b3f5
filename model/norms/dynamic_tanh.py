"""Dynamic tanh (Zhu et al. 2025, 2503.10622). Axes: B batch, T tokens, D width."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from core.registry import register
from model.leaves import NormVector, Replicated
from model.precision import at_least_float32


@register(
    "norm",
    "dynamic_tanh",
    paper="2503.10622",
    title="Transformers without Normalization",
    aliases=["dyt"],
)
class DynamicTanh(nn.Module):
    """tanh(α · x) · gain + bias, elementwise, with one learned α: no statistics at all.

    The paper reports that it matches or exceeds normalised transformers, mostly with their own
    settings.

    Args:
        alpha: the first value of α; large language models want less, the wider the less.
        bias: learn an offset per channel beside the gain.
    """

    def __init__(self, dim: int, *, alpha: Annotated[float, Field(gt=0)] = 0.5, bias: bool = True):
        super().__init__()
        self.alpha = Replicated(1, fill=alpha)
        self.gain = NormVector(dim)
        self.bias = NormVector(dim, fill="zeros") if bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = (self.alpha() * at_least_float32(x_BTD)).tanh() * self.gain()
        if self.bias is not None:
            y_BTD = y_BTD + self.bias()
        return y_BTD.to(x_BTD.dtype)
