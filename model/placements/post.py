"""Post-norm: norm(x + f(x)) (Vaswani et al. 2017, 1706.03762)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.registry import build, register
from model.placements.base import Placement


@register(
    "placement",
    "post",
    paper="1706.03762",
    title="Attention Is All You Need",
    aliases=["post_norm"],
)
class PostNorm(Placement):
    """A norm after each residual addition; the stack needs none at its end."""

    final_norm = False
    closes = True

    def __init__(self, dim: int, norm: Any):
        super().__init__()
        self.norm = build("norm", norm, dim=dim)

    def close(self, x_BTD: Tensor) -> Tensor:
        normed: Tensor = self.norm(x_BTD)
        return normed
