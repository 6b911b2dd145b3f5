"""RMSNorm (Zhang and Sennrich 2019, 1910.07467). Axes: B batch, T tokens, D width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from core.registry import register
from model.leaves import NormVector


@register(
    "norm",
    "rmsnorm",
    paper="1910.07467",
    title="Root Mean Square Layer Normalization",
    aliases=["rms_norm"],
)
class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · gain [+ bias], over the last axis.

    Args:
        eps: added to the mean square.
        gain: learn a gain per channel.
        bias: learn an offset per channel too.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, gain: bool = True, bias: bool = False):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.gain = NormVector(dim) if gain else None
        self.bias = NormVector(dim, fill="zeros") if bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight = self.gain().to(x_BTD.dtype) if self.gain is not None else None
        y_BTD = F.rms_norm(x_BTD, (self.dim,), weight, self.eps)
        return y_BTD if self.bias is None else y_BTD + self.bias().to(x_BTD.dtype)
