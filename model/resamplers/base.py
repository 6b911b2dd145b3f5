"""The resampler protocol. Axes: B batch, T tokens, D width before, E width after.

A resampler runs inside the region, on all tokens of the stage before, alike on every rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.stems.base import Grid


class Resampler(nn.Module):
    """(x_BTD, grid) → (y_BTE, grid): from one stage's tokens to the next stage's."""

    def forward(self, x_BTD: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        raise NotImplementedError

    def grid(self, grid: Grid) -> Grid:
        """The next stage's grid."""
        raise NotImplementedError
