"""Peri-LN: norms on the periphery of each branch and of the stack (Kim et al. 2025, 2502.02732).

x_0 ← norm(x_0);   x ← x + norm(f(norm(x)));   y = norm(x_L)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.registry import build, register
from model.placements.sandwich import SandwichNorm


@register(
    "placement",
    "peri_ln",
    paper="2502.02732",
    title="Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
)
class PeriNorm(SandwichNorm):
    """Sandwich norm whose stack also starts with a norm, of the embeddings.

    The paper reports that the variance of the hidden state grows about linearly with depth, where
    pre-norm's may grow exponentially, and steadier gradients.

    Args:
        embedding: normalise what enters the first block; without it this is `sandwich`.
    """

    def __init__(self, dim: int, norm: Any, sublayer: int = 0, *, embedding: bool = True):
        super().__init__(dim, norm)
        self.closes = embedding and sublayer == 0
        self.embedding_norm = build("norm", norm, dim=dim) if self.closes else None

    def open(self, x_BTD: Tensor) -> Tensor:
        if self.embedding_norm is None:
            return x_BTD
        normed: Tensor = self.embedding_norm(x_BTD)
        return normed
