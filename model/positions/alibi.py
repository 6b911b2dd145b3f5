"""Attention with linear biases (Press, Smith and Lewis 2021, 2108.12409).

Axes: B batch, T queries, S keys, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.registry import register
from model.leaves import HeadParameter
from model.positions.base import Position


def slopes(heads: int) -> list[float]:
    """A geometric sequence per head: 2^(−8/H), 2^(−16/H), … for H a power of two.

    Otherwise, as in the authors' code, the sequence of the power of two below H, and then every
    other member of the sequence of the power of two above it.
    """
    lower = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2 ** (-4 * (i + 1) / lower) for i in range(0, 2 * lower, 2)]
    return first + between[: heads - lower]


@register(
    "position",
    "alibi",
    paper="2108.12409",
    title="Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
)
class ALiBi(Position):
    """Scores fall with distance: −slope_h · |t − s| is added, slopes fixed per head.

    Without causality the bias is the same on both sides.
    """

    place = "attention"
    biases = True

    def __init__(self, heads: int):
        super().__init__()

        # A constant held as a parameter, so that it is sharded with the heads and saved.
        def fill(shape: torch.Size, generator: torch.Generator) -> Tensor:
            return torch.tensor(slopes(shape[0]))

        self.slopes = HeadParameter(heads, fill=fill, trainable=False)

    def per_head(self) -> Tensor:
        slopes_H: Tensor = self.slopes()
        return slopes_H

    def form(self, per_head: Tensor, queries_BT: Tensor, keys_BS: Tensor) -> Tensor:
        distance_BTS = (queries_BT[:, :, None] - keys_BS[:, None, :]).abs()
        return -per_head[:, None, None] * distance_BTS[:, None]
