"""FlexAttention (Dong et al. 2024, 2412.05496): masks by blocks, compiled on GPUs.

Whole blocks that no query sees are skipped, so packed documents and windows cost what they hold.

Axes: B batch, H query heads, G key-value heads, T queries, S keys, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from core.errors import UserError
from model.attention.scores import Scores

_SMALLEST = 16
"""The narrowest head of the GPU kernel."""


def with_flex(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores) -> Tensor:
    """Attention by FlexAttention; on a CPU, uncompiled, slow and without gradients."""
    _check(q_BHTK, k_BGSK, v_BGSK, scores)
    attention: Any = _compiled() if q_BHTK.is_cuda else flex_attention
    y_BHTK: Tensor = attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        score_mod=_score_mod(scores),
        block_mask=_block_mask(scores, q_BHTK.shape[2], k_BGSK.shape[2], q_BHTK),
        scale=scores.scale,
        enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
    )
    return y_BHTK


def _check(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores) -> None:
    if scores.dropout:
        raise UserError("attention backend 'flex' has no dropout; set dropout: 0 or backend: sdpa")
    if q_BHTK.dtype == torch.float64:
        raise UserError("attention backend 'flex' computes in float32, bfloat16 or float16")
    if q_BHTK.is_cuda and q_BHTK.shape[-1] < _SMALLEST:
        raise UserError(
            f"attention backend 'flex' needs heads of at least {_SMALLEST} channels on a GPU, "
            f"these have {q_BHTK.shape[-1]}; use wider heads or backend: sdpa"
        )
    learning = any(x.requires_grad for x in (q_BHTK, k_BGSK, v_BGSK))
    if q_BHTK.device.type == "cpu" and learning:
        raise UserError(
            "attention backend 'flex' has no gradients on a CPU; use backend: sdpa to train there"
        )


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Compiled once: uncompiled it would hold the whole score matrix."""
    return torch.compile(flex_attention)


def _score_mod(scores: Scores) -> Callable[..., Tensor] | None:
    """What happens to each scaled score before the softmax."""
    cap, bias_BHTS = scores.softcap, scores.bias
    if cap is None and bias_BHTS is None:
        return None

    def modify(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias_BHTS is not None:
            score = score + bias_BHTS[b if bias_BHTS.shape[0] > 1 else 0, h, t, s]
        return score

    return modify


def _block_mask(scores: Scores, queries: int, keys: int, like: Tensor) -> BlockMask | None:
    """The mask as blocks, kept for the next layer; None where all see all."""
    packed = (scores.documents is not None, scores.key_documents is not None)
    if not scores.causal and scores.window is None and not packed[0]:
        return None
    name = f"blocks:{queries}:{keys}:{scores.causal}:{scores.first}:{scores.window}:{packed}"
    if name not in scores.scratch:
        first = keys - queries if scores.first is None else scores.first
        batch = scores.documents.shape[0] if scores.documents is not None else None
        scores.scratch[name] = create_block_mask(
            _mask_mod(scores, first), batch, None, queries, keys, device=like.device
        )
    held: BlockMask = scores.scratch[name]
    return held


def _mask_mod(scores: Scores, offset: int) -> Callable[..., Tensor]:
    """Whether query t of sample b sees key s; the first query is key `offset`."""
    causal, window, queries_BT = scores.causal, scores.window, scores.documents
    keys_BS = queries_BT if scores.key_documents is None else scores.key_documents

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        distance = t + offset - s
        seen = distance >= 0 if causal else distance == distance
        if window is not None:
            seen = seen & (distance.abs() < window)
        if queries_BT is not None and keys_BS is not None:
            seen = seen & (queries_BT[b, t] == keys_BS[b, s])
        return seen

    return sees
