"""BiasNorm, of Zipformer (Yao et al. 2023, 2310.11230). Axes: B batch, T tokens, D width."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from core.registry import register
from model.leaves import NormVector, Replicated
from model.precision import at_least_float32


@register(
    "norm",
    "biasnorm",
    paper="2310.11230",
    title="Zipformer: A faster and better encoder for automatic speech recognition",
    aliases=["bias_norm"],
)
class BiasNorm(nn.Module):
    """x / RMS(x − b) · exp(γ), with a learned vector b and one learned scalar γ.

    What is divided is x itself, so its length may still tell something: a channel with a large b
    shrinks the others. The exponential keeps the gain from passing through zero, where training
    was found to get stuck.

    Args:
        log_scale: the first value of γ.
        eps: added to the mean square; the formula has none, and divides by zero where x = b.
    """

    def __init__(
        self, dim: int, *, log_scale: float = 1.0, eps: Annotated[float, Field(ge=0)] = 1e-8
    ):
        super().__init__()
        self.eps = eps
        self.bias = NormVector(dim, fill="zeros")
        self.log_scale = Replicated(1, fill=log_scale)

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = at_least_float32(x_BTD)
        square_BT1 = (wide_BTD - self.bias()).square().mean(-1, keepdim=True)
        scale_BT1 = (square_BT1 + self.eps).rsqrt() * self.log_scale().exp()
        y_BTD: Tensor = (wide_BTD * scale_BT1).to(x_BTD.dtype)
        return y_BTD
