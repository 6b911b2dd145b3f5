"""Attention in plain PyTorch: written out, and as the fused function.

Axes: B batch, H query heads, G key-value heads, T queries, S keys, K head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from model.attention.scores import Scores
from model.precision import at_least_float32


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
        raise UserError("attention backend 'sdpa' has no softcap; use backend: reference or flex")
    queries, keys = q_BHTK.shape[2], k_BGSK.shape[2]
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    # The newest token alone sees every key.
    causal = scores.causal and (queries > 1 or scores.first is not None)
    simple = scores.plain and (not causal or (queries == keys and not scores.first))
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
