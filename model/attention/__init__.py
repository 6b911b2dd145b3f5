"""Scaled dot-product attention behind one function, with the backend chosen by name.

Axes: B batch, H query heads, G key-value heads (H a multiple of G), T queries, S keys,
K head width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from model.attention.flash import with_flash
from model.attention.flex import with_flex
from model.attention.plain import reference, sdpa
from model.attention.scores import Bias, Scores

Backend = Literal["auto", "reference", "sdpa", "flex", "flash"]

_BACKENDS = {"reference": reference, "sdpa": sdpa, "flex": with_flex, "flash": with_flash}

__all__ = ["Backend", "Bias", "Scores", "attend"]


def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scores: Scores, backend: Backend = "auto"
) -> Tensor:
    """softmax(scale · q kᵀ + bias, masked) v, as BHTK.

    `auto` is PyTorch's fused attention, or the reference where scores are capped.

    Raises:
        UserError: if the backend is not installed or cannot do what is asked.
    """
    if backend == "auto":
        backend = "reference" if scores.softcap is not None else "sdpa"
    return _BACKENDS[backend](q_BHTK, k_BGSK, v_BGSK, scores.made())
