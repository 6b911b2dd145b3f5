"""Scaled dot-product attention behind one function, with the backend chosen by name.

Axes: B batch, H query heads, G key-value heads (H a multiple of G), T queries, S keys,
K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.precision import at_least_float32

Backend = Literal["auto", "reference", "sdpa", "flex", "flash"]


@dataclass
class Scores:
    """What shapes the scores besides q·k.

    causal: query t sees keys up to t (keys end where the queries end).
    window: how many of the latest keys a query sees, itself among them; None for all.
    documents, key_documents: a query sees keys of its own document only; the second are those of
        the keys, where they are not the queries' own. A query that sees no key gets zeros.
    bias: added to the scores, [B or 1, H, T, S].
    scale: multiplies q·k; 1/sqrt(K) if None.
    softcap: scores become c·tanh(score/c).
    scratch: where masks may be kept for the next layer of the same forward.
    """

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None
    key_documents: Tensor | None = None
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether nothing but causality restricts or biases the scores."""
        return self.window is None and self.documents is None and self.bias is None

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """True where a query sees a key, [B or 1, 1, T, S]; None where all see all."""
        packed = (self.documents is not None, self.key_documents is not None)
        key = f"mask:{queries}:{keys}:{self.causal}:{self.window}:{packed}"
        if key not in self.scratch:
            self.scratch[key] = self._mask(queries, keys, device)
        held: Tensor | None = self.scratch[key]
        return held

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        seen: Tensor | None = None
        distance_TS = (
            torch.arange(keys - queries, keys, device=device)[:, None]
            - torch.arange(keys, device=device)[None, :]
        )
        if self.causal:
            seen = (distance_TS >= 0)[None, None]
        if self.window is not None:
            near = (distance_TS.abs() < self.window)[None, None]
            seen = near if seen is None else seen & near
        if self.documents is not None:
            keys_BS = self.documents if self.key_documents is None else self.key_documents
            same = (self.documents[:, :, None] == keys_BS[:, None, :])[:, None]
            seen = same if seen is None else seen & same
        return seen


def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores, backend: Backend = "auto"
) -> Tensor:
    """softmax(scale · q kᵀ + bias, masked) v, as BHTK.

    Raises:
        UserError: if the backend is not installed or cannot do what is asked.
    """
    if backend == "auto":
        backend = "reference" if scores.softcap is not None else "sdpa"
    return _BACKENDS[backend](q_BHTK, k_BGSK, v_BGSK, scores)


def reference(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores) -> Tensor:
    """Attention written out: the whole score matrix, softmax in float32."""
    group = q_BHTK.shape[1] // k_BGSK.shape[1]
    k, v = k_BGSK.repeat_interleave(group, 1), v_BGSK.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q_BHTK.shape[-1]) if scores.scale is None else scores.scale
    s_BHTS = at_least_float32(q_BHTK @ k.transpose(-1, -2)) * scale
    if scores.softcap is not None:
        s_BHTS = scores.softcap * torch.tanh(s_BHTS / scores.softcap)
    if scores.bias is not None:
        s_BHTS = s_BHTS + scores.bias
    mask = scores.mask(q_BHTK.shape[2], k_BGSK.shape[2], q_BHTK.device)
    if mask is not None:
        # A finite fill: a query that sees no key gets zeros below, and no NaN in its gradient.
        s_BHTS = s_BHTS.masked_fill(~mask, torch.finfo(s_BHTS.dtype).min)
    w_BHTS = s_BHTS.softmax(-1)
    if mask is not None:
        w_BHTS = w_BHTS.masked_fill(~mask, 0.0)
    return F.dropout(w_BHTS, scores.dropout).to(v.dtype) @ v


def sdpa(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores) -> Tensor:
    """PyTorch's fused attention; document masks and biases go in as an explicit mask."""
    if scores.softcap is not None:
        from core.errors import UserError

        raise UserError("attention backend 'sdpa' has no softcap; use backend: reference or flex")
    queries, keys = q_BHTK.shape[2], k_BGSK.shape[2]
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    causal = scores.causal and queries > 1  # the newest token alone sees every key
    simple = scores.plain and (not causal or queries == keys)
    mask = None if simple else scores.mask(queries, keys, q_BHTK.device)
    if scores.bias is not None:
        bias = scores.bias.to(q_BHTK.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        mask,
        scores.dropout,
        is_causal=simple and causal,
        scale=scores.scale,
        enable_gqa=grouped,
    )


_BACKENDS = {"reference": reference, "sdpa": sdpa}
