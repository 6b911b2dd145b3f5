"""Value residual learning: later layers attend over the first layer's values too.

    V'_n = λ1 · V_1 + λ2 · V_n,   y_n = A_n V'_n W_O

V_1 is carried in the stream per key-value head, so it splits with the heads and crosses no border
of a sublayer: tensor parallelism sends nothing for it.

Axes: B batch, T tokens, S all tokens so far, D width, H query heads, G key-value heads,
K head width.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from core.errors import UserError
from core.registry import Slot, register
from model.attention import Backend
from model.leaves import Replicated
from model.mixers.attention import Attention
from model.stream import Stream

Form = Literal["identity", "learnable", "single"]
FIRST = "first_values"
"""What `stream.carried` calls V_1 of these tokens, BTGK."""
_STORED = "stored_values"  # of all tokens so far, BGSK, while decoding from a cache
_Positive = Annotated[int | None, Field(gt=0)]


@register(
    "mixer",
    "resformer",
    paper="2410.17897",
    title="Value Residual Learning For Alleviating Attention Concentration In Transformers",
    aliases=["value_residual", "svformer"],
)
class ResFormer(Attention):
    """Attention whose values mix in those of its stack's first block (Zhou et al. 2024).

    It stands for attention over the first layer's values, A_n V_1, at no further product; the
    paper reports lower loss than the plain transformer, DenseFormer and NeuTRENO. In form `single`
    (SVFormer) every block reads V_1 alone, later blocks have no value projection, and a decoding
    cache holds (L + 1) / 2L of the original: half for deep models. The first block is plain
    attention in every form, and has to be a resformer where any later block is one.

    Args:
        form: identity holds λ1 and λ2 fixed, learnable trains the two per block, single is
            V'_n = V_1 (SVFormer).
        lambda1: the weight of the first block's values, or its first value.
        lambda2: the weight of the block's own values, or its first value.
        blocks: the sparse form: which blocks of the stack, from 0, mix values; all but the first
            if not given.
        heads: query heads.
        kv_heads: key-value heads; as many as `heads` if not given.
        head_dim: width of a head; D / heads if not given.
        bias: biases in the query, key and value projections.
        out_bias: a bias in the output projection; as `bias` if not given.
        qk_norm: a norm over each head's queries and keys, before positions.
        window: how many of the latest tokens a query sees (the nearest on both sides without
            causality).
        scale: multiplies the scores; 1/sqrt(K) if not given.
        softcap: scores become c·tanh(score / c).
        dropout: dropout on the attention weights.
        backend: as in attention.
    """

    probe = {"heads": 4, "kv_heads": 2}

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        position: Any = "none",
        max_length: int | None = None,
        grid: tuple[int, int] | None = None,
        layer: int = 0,
        index: int = 0,
        branch: str = "mixer",
        *,
        form: Form = "learnable",
        lambda1: float = 0.5,
        lambda2: float = 0.5,
        blocks: list[Annotated[int, Field(gt=0)]] | None = None,
        heads: Annotated[int, Field(gt=0)] = 8,
        kv_heads: _Positive = None,
        head_dim: _Positive = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: Annotated[Any, Slot("norm", optional=True)] = None,
        window: _Positive = None,
        scale: Annotated[float | None, Field(gt=0)] = None,
        softcap: Annotated[float | None, Field(gt=0)] = None,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        backend: Backend = "auto",
    ):
        super().__init__(
            dim,
            causal,
            position,
            max_length,
            grid,
            layer,
            branch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            window=window,
            scale=scale,
            softcap=softcap,
            dropout=dropout,
            backend=backend,
        )
        self.first = index == 0
        self.mixes = not self.first and (blocks is None or index in blocks)
        self.form, self.lambda1, self.lambda2 = form, lambda1, lambda2
        self.weights: Replicated | None = None
        if self.mixes and form == "learnable":
            self.weights = Replicated(
                2, fill=lambda shape, generator: torch.tensor([lambda1, lambda2])
            )
        self.reads_only = self.mixes and form == "single"
        if self.reads_only:
            del self.v

    def values(self, x_BTD: Tensor, stream: Stream) -> Tensor:
        if self.first:
            own_BTGK = super().values(x_BTD, stream)
            stream.carried[FIRST] = own_BTGK
            return own_BTGK
        if not self.mixes:
            return super().values(x_BTD, stream)
        if FIRST not in stream.carried:
            raise UserError(
                "mixer resformer reads the values of its stack's first block: let that block's "
                "mixer be resformer too"
            )
        first_BTGK: Tensor = stream.carried[FIRST]
        if self.reads_only:
            return first_BTGK
        own_BTGK = super().values(x_BTD, stream)
        if self.weights is None:
            return self.lambda1 * first_BTGK + self.lambda2 * own_BTGK
        weights: Tensor = self.weights().to(own_BTGK.dtype)
        return weights[0] * first_BTGK + weights[1] * own_BTGK

    def remember(self, k_BGTK: Tensor, v_BGTK: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        if self.form != "single" or not (self.first or self.mixes):
            return super().remember(k_BGTK, v_BGTK, stream)
        # Only the first block stores values. It hands all of them on, whatever its own window.
        own = v_BGTK if self.first else v_BGTK[..., :0]
        k_BGSK, v_BGSK = stream.cache.extend(self.entry, k_BGTK, own)
        if self.first:
            stream.carried[_STORED] = v_BGSK
        start = 0 if self.window is None else max(0, stream.cache.length - self.window + 1)
        return k_BGSK[:, :, start:], stream.carried[_STORED][:, :, start:]
