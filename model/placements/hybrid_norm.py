"""HybridNorm: norms of queries, keys and values, and a norm of the stream between the branches.

y = x + W_O · attention(norm(q), norm(k), norm(v)),   u = norm(y),   z = u + f(u)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.registry import build, register
from model.placements.base import Placement


@register(
    "placement",
    "hybrid_norm",
    paper="2503.04598",
    title="HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid Normalization",
    aliases=["hybridnorm"],
)
class HybridNorm(Placement):
    """QKV-norm in attention, without a norm before it, and post-norm around the feed-forward
    (Zhuo et al. 2025).

    Queries, keys and values are normalised per head, before positions, by a gain that the heads
    share. The feed-forward's residual starts after its norm. The published model of 1.2 billion
    parameters has 16 layers, width 2048, 32 heads of which 8 of keys, swiglu, rmsnorm with eps
    1e-5 and RoPE of base 500,000. The paper reports lower loss than pre-norm and post-norm, dense
    and in mixtures of experts.

    Args:
        star: HybridNorm*: the first block alone also has a norm before attention, and pre-norm in
            its feed-forward.
    """

    def __init__(
        self, dim: int, norm: Any, layer: int = 0, branch: str = "mixer", *, star: bool = False
    ):
        super().__init__()
        feedforward = branch == "feedforward"
        self.spec = norm
        self.first = star and layer == 0
        self.closes = feedforward and not self.first
        self.norm = build("norm", norm, dim=dim) if feedforward or self.first else None

    def options(self, branch: str) -> dict[str, Any]:
        return {} if branch == "feedforward" else {"qk_norm": self.spec, "v_norm": self.spec}

    def open(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def before(self, x_BTD: Tensor) -> Tensor:
        return self.norm(x_BTD) if self.norm is not None and self.first else x_BTD
