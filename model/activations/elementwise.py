"""Elementwise activations that PyTorch provides, by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from core.registry import register


@register("activation", "gelu", paper="1606.08415", title="Gaussian Error Linear Units (GELUs)")
class GELU(nn.Module):
    """x · Φ(x).

    Args:
        approximate: use the tanh form, as GPT-2 does.
    """

    def __init__(self, *, approximate: bool = False):
        super().__init__()
        self.mode = "tanh" if approximate else "none"

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.mode)


@register("activation", "relu")
class ReLU(nn.Module):
    """max(x, 0)."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@register(
    "activation",
    "relu2",
    paper="2109.08668",
    aliases=["squared_relu"],
    title="Primer: Searching for Efficient Transformers for Language Modeling",
)
class SquaredReLU(nn.Module):
    """max(x, 0)² (So et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@register(
    "activation",
    "silu",
    aliases=["swish"],
    paper="1710.05941",
    title="Searching for Activation Functions",
)
class SiLU(nn.Module):
    """x · sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


@register("activation", "tanh")
class Tanh(nn.Module):
    """The hyperbolic tangent."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


@register("activation", "sigmoid")
class Sigmoid(nn.Module):
    """1 / (1 + exp(−x))."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


@register("activation", "linear")
class Linear(nn.Module):
    """The identity: a gated feed-forward with it is bilinear."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
