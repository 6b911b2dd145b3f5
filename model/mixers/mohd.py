"""Mixture of hidden dimensions: attention whose projections use few sub-dimensions of the width.

    q, k, v = W_q z, W_k z, W_v z,   z = α g ⊙ x
    y = Pᵀ L P R · (W_o · heads(q, k, v) on rows A, 0 elsewhere)

A, g, α and the fusion are in model/subdimensions.py.

Axes: B batch, T tokens, D width, H query heads, G key-value heads, K head width, C all heads.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from core.registry import Slot, register
from model.attention import Backend
from model.mixers.attention import Attention
from model.stream import Stream
from model.subdimensions import Reads, Select, Writes, divide

_Positive = Annotated[int | None, Field(gt=0)]


@register(
    "mixer",
    "mohd",
    paper="2412.05644",
    title="Mixture of Hidden-Dimensions Transformer",
)
class MoHDAttention(Attention):
    """Each token's queries, keys and values are of the sub-dimensions it has of the width, and its
    output goes to them; the heads stay whole (Chen et al. 2024).

    To be used with the feed-forward of the same name, which tells of the options and of what the
    paper reports. Each has a router of its own.

    Args:
        heads: query heads.
        kv_heads: key-value heads; as many as `heads` if not given.
        head_dim: width of a head; D / expansion / heads if not given.
        sub_dimensions: how many sub-dimensions the width has at expansion 1.
        expansion: the width is so many times that of the model whose cost it keeps, and has so many
            times its sub-dimensions.
        delta: a token has this times `sub_dimensions`.
        shared: which part of those is the same for all tokens.
        fusion: mix what was written, by a Monarch matrix that starts as the identity.
        balance: weight of the loss that evens out how often each sub-dimension is chosen.
        qk_norm: a norm over each head's queries and keys, before positions.
        window: how many of the latest tokens a query sees (the nearest on both sides without
            causality).
        dropout: dropout on the attention weights.
        backend: reference, sdpa, flex or flash; auto takes the fastest that can do what is asked.
    """

    multiway = False  # one choice of sub-dimensions serves queries, keys and values
    selectors = tuple(f"reads.{part}.{name}" for part in ("shared", "chosen") for name in "qk")
    probe: ClassVar[dict[str, Any]] = {
        "heads": 4,
        "kv_heads": 2,
        "sub_dimensions": 8,
        "shared": 0.5,
    }

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        position: Any = "none",
        max_length: int | None = None,
        grid: tuple[int, int] | None = None,
        layer: int = 0,
        branch: str = "mixer",
        *,
        heads: Annotated[int, Field(gt=0)] = 8,
        kv_heads: _Positive = None,
        head_dim: _Positive = None,
        sub_dimensions: Annotated[int, Field(gt=0)] = 16,
        expansion: Annotated[int, Field(gt=0)] = 1,
        delta: Annotated[float, Field(gt=0, le=1)] = 0.5,
        shared: Annotated[float, Field(gt=0, le=1)] = 0.75,
        fusion: bool = True,
        balance: Annotated[float, Field(ge=0)] = 0.01,
        qk_norm: Annotated[Any, Slot("norm", optional=True)] = None,
        window: _Positive = None,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        backend: Backend = "auto",
    ):
        division = divide(dim, sub_dimensions, expansion, delta, shared)
        super().__init__(
            dim // expansion,
            causal,
            position,
            max_length,
            grid,
            layer,
            branch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            window=window,
            dropout=dropout,
            backend=backend,
        )
        self.division = division
        queries, keys = heads * self.head_dim, self.kv_heads * self.head_dim
        del self.q, self.k, self.v, self.out  # these take their place
        name = f"mohd_attention/{layer}"
        self.select = Select(dim, division, balance, "mohd_attention_balance", name)
        self.reads = Reads(division, {"q": queries, "k": keys, "v": keys})
        self.writes = Writes(division, queries, fusion)

    @property
    def active_fraction(self) -> float:
        """The share of the banks of sub-dimensions that one token uses."""
        return self.division.active_fraction

    def forward(
        self,
        x_BTD: Tensor,
        stream: Stream,
        keys_BTD: Tensor | None = None,
        values_BTD: Tensor | None = None,
    ) -> Tensor:
        active = self.select(x_BTD, stream)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.reads(active))
        y_BTC = self.mix(q, k, v, stream, self.select.axis.ops.context)
        y_BTD: Tensor = self.writes(y_BTC, active)
        return y_BTD.to(x_BTD.dtype)

    def flops(self, x_BTD: Tensor, stream: Stream | None = None) -> int:
        """Forward operations of the router, of what is active, of the scores and of the fusion."""
        batch, tokens, _ = x_BTD.shape
        parts = self.reads.operations(batch * tokens) + self.writes.operations(batch * tokens)
        return self.select.router.flops(x_BTD) + parts + self.math_flops(batch, tokens)
