"""FlashAttention (Dao 2023, 2307.08691), where the package flash-attn is installed.

Packed documents become sequences of their own, so nothing is computed between them.

Axes: B batch, H query heads, G key-value heads, T queries, S keys, K head width, N tokens of all
samples.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from model.attention.scores import Scores

_WIDEST = 256


def with_flash(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores) -> Tensor:
    """Attention by the flash-attn kernels: GPU tensors in bfloat16 or float16."""
    package = _installed()
    _check(q_BHTK, scores)
    return call(package, q_BHTK, k_BGSK, v_BGSK, scores)


def _installed() -> Any:
    try:
        return importlib.import_module("flash_attn")
    except ImportError:
        raise UserError(
            "attention backend 'flash' needs the package flash-attn, which is not installed; "
            "install the extra [gpu], or use backend: sdpa"
        ) from None


def _check(q_BHTK: Tensor, scores: Scores) -> None:
    width, kind = q_BHTK.shape[-1], q_BHTK.dtype
    if not q_BHTK.is_cuda:
        raise UserError(
            f"attention backend 'flash' runs on GPUs, these tensors are on {q_BHTK.device.type}; "
            "use backend: sdpa"
        )
    if kind not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"attention backend 'flash' computes in bfloat16 or float16, not {kind}; set "
            "train.precision: bf16, or use backend: sdpa"
        )
    if width > _WIDEST or width % 8:
        raise UserError(
            f"attention backend 'flash' takes heads of a multiple of 8 up to {_WIDEST} channels, "
            f"these have {width}; change head_dim, or use backend: sdpa"
        )
    if scores.bias is not None:
        raise UserError(
            "attention backend 'flash' adds no bias to the scores, which this position needs; use "
            "backend: flex or sdpa"
        )
    if scores.first is not None:
        raise UserError(
            "attention backend 'flash' lets the keys end where the queries end, which these do "
            "not; use backend: flex or sdpa"
        )
    if scores.key_documents is not None:
        raise UserError(
            "attention backend 'flash' has no mask between two packings; use backend: flex or sdpa"
        )


def call(package: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores) -> Tensor:
    """Hand the tensors to the package's functions, in their layouts."""
    q, k, v = (x.transpose(1, 2) for x in (q_BHTK, k_BGSK, v_BGSK))
    near = -1 if scores.window is None else scores.window - 1
    options = {
        "dropout_p": scores.dropout,
        "softmax_scale": scores.scale,
        "causal": scores.causal,
        "window_size": (near, 0 if scores.causal and near >= 0 else near),
        "softcap": scores.softcap or 0.0,
    }
    if scores.documents is None:
        y_BTHK: Tensor = package.flash_attn_func(q, k, v, **options)
        return y_BTHK.transpose(1, 2)
    starts, longest = _sequences(scores)
    y_NHK = package.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), starts, starts, longest, longest, **options
    )
    packed: Tensor = y_NHK.unflatten(0, q.shape[:2]).transpose(1, 2)
    return packed


def _sequences(scores: Scores) -> tuple[Tensor, int]:
    """Where each document starts in the tokens of all samples, the end after them; the longest.

    Raises:
        UserError: if a document's tokens do not stand together.
    """
    assert scores.documents is not None
    if "sequences" not in scores.scratch:
        ids_BT = scores.documents
        first_BT = F.pad(ids_BT[:, 1:] != ids_BT[:, :-1], (1, 0), value=True)
        starts = first_BT.flatten().nonzero()[:, 0].to(torch.int32)
        row_BT = torch.arange(ids_BT.shape[0], device=ids_BT.device)[:, None].expand_as(ids_BT)
        distinct = torch.stack((row_BT.flatten(), ids_BT.flatten())).unique(dim=1).shape[1]
        if distinct != starts.numel():
            raise UserError(
                "attention backend 'flash' needs each document's tokens to stand together; use "
                "backend: flex or sdpa"
            )
        starts = F.pad(starts, (0, 1), value=ids_BT.numel())
        scores.scratch["sequences"] = (starts, int(starts.diff().max()))
    held: tuple[Tensor, int] = scores.scratch["sequences"]
    return held
