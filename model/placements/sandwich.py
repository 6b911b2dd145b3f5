"""Sandwich norm: x + norm(f(norm(x))) (Ding et al. 2021, 2105.13290)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.registry import build, register
from model.placements.base import Placement


@register(
    "placement",
    "sandwich",
    paper="2105.13290",
    title="CogView: Mastering Text-to-Image Generation via Transformers",
    aliases=["sandwich_norm"],
)
class SandwichNorm(Placement):
    """A norm before and a norm after each branch, so that no branch writes large values.

    The paper needs it to train a text-to-image transformer in half precision without overflow.
    """

    def __init__(self, dim: int, norm: Any):
        super().__init__()
        self.norm = build("norm", norm, dim=dim)
        self.after_norm = build("norm", norm, dim=dim)

    def before(self, x_BTD: Tensor) -> Tensor:
        normed: Tensor = self.norm(x_BTD)
        return normed

    def after(self, y_BTD: Tensor) -> Tensor:
        normed: Tensor = self.after_norm(y_BTD)
        return normed
