"""Swoosh activations, of Zipformer (Yao et al. 2023, 2310.11230)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from core.registry import register

_SOURCE: Any = {
    "paper": "2310.11230",
    "title": "Zipformer: A faster and better encoder for automatic speech recognition",
}


class Swoosh(nn.Module):
    """log(1 + exp(x − shift)) − 0.08 x − offset: never flat, so no unit dies."""

    def __init__(self, shift: float, offset: float) -> None:
        super().__init__()
        self.shift, self.offset = shift, offset

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x - self.shift) - 0.08 * x - self.offset


@register("activation", "swoosh_r", **_SOURCE)
class SwooshR(Swoosh):
    """log(1 + exp(x − 1)) − 0.08 x − 0.313261687, which is 0 at 0: for convolutions."""

    def __init__(self) -> None:
        super().__init__(1.0, 0.313261687)


@register("activation", "swoosh_l", **_SOURCE)
class SwooshL(Swoosh):
    """log(1 + exp(x − 4)) − 0.08 x − 0.035, off for most of its range: for feed-forwards."""

    def __init__(self) -> None:
        super().__init__(4.0, 0.035)
