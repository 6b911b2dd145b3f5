"""LayerNorm (Ba, Kiros and Hinton 2016, 1607.06450). Axes: B batch, T tokens, D width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from core.registry import register
from model.leaves import NormVector


@register(
    "norm", "layernorm", paper="1607.06450", title="Layer Normalization", aliases=["layer_norm"]
)
class LayerNorm(nn.Module):
    """(x − mean) / sqrt(variance + eps) · gain + bias, over the last axis.

    Args:
        eps: added to the variance.
        bias: learn an offset per channel beside the gain.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.gain = NormVector(dim)
        self.bias = NormVector(dim, fill="zeros") if bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        bias = self.bias().to(x_BTD.dtype) if self.bias is not None else None
        return F.layer_norm(x_BTD, (self.dim,), self.gain().to(x_BTD.dtype), bias, self.eps)
