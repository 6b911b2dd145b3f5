"""Patch merging (Liu et al. 2021, 2103.14030). Axes: B, T tokens, D width before, E width after."""

from __future__ import annotations

from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from core.registry import Slot, build, register
from model.leaves import ReplicatedLinear
from model.resamplers.base import Resampler
from model.stems.base import Grid


@register(
    "resample",
    "patch_merging",
    paper="2103.14030",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
)
class PatchMerging(Resampler):
    """The channels of each square of tokens side by side, normalised and projected.

    Channels are ordered by column of the square, then row. A grid that the square does not divide
    is filled up with zeros.

    Args:
        factor: side of the square.
        norm: the norm before the projection; null for none.
        bias: a bias in the projection.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        factor: Annotated[int, Field(gt=0)] = 2,
        norm: Annotated[Any, Slot("norm", optional=True)] = "layernorm",
        bias: bool = False,
    ):
        super().__init__()
        self.factor = factor
        merged = factor**2 * dim
        self.norm = build("norm", norm, dim=merged) if norm is not None else None
        self.reduce = ReplicatedLinear(merged, dim_out, bias)

    def forward(self, x_BTD: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        rows, columns = self.grid(grid)
        side = self.factor
        x = x_BTD.unflatten(1, grid)
        x = F.pad(x, (0, 0, 0, columns * side - grid[1], 0, rows * side - grid[0]))
        x = x.unflatten(2, (columns, side)).unflatten(1, (rows, side))
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        if self.norm is not None:
            x = self.norm(x)
        return self.reduce(x), (rows, columns)

    def grid(self, grid: Grid) -> Grid:
        return -(-grid[0] // self.factor), -(-grid[1] // self.factor)
