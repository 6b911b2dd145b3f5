"""Pre-norm: x + f(norm(x)) (Xiong et al. 2020, 2002.04745)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.registry import build, register
from model.placements.base import Placement


@register(
    "placement",
    "pre",
    paper="2002.04745",
    title="On Layer Normalization in the Transformer Architecture",
    aliases=["pre_norm"],
)
class PreNorm(Placement):
    """A norm before each branch; the stream itself is never normalised until the end."""

    def __init__(self, dim: int, norm: Any):
        super().__init__()
        self.norm = build("norm", norm, dim=dim)

    def before(self, x_BTD: Tensor) -> Tensor:
        normed: Tensor = self.norm(x_BTD)
        return normed
