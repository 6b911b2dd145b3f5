"""A strided convolution between stages (Wang et al. 2021, 2102.12122). Axes: B, T, D, E width."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from core.registry import Slot, build, register
from model.leaves import Convolution
from model.resamplers.base import Resampler
from model.stems.base import Grid, extent, tokens


@register(
    "resample",
    "conv",
    paper="2111.11418",
    title="MetaFormer Is Actually What You Need for Vision",
    aliases=["downsampling"],
)
class ConvResampler(Resampler):
    """A convolution with a stride (Yu et al. 2021), overlapping where the kernel is larger.

    Args:
        kernel: side of the kernel in tokens.
        stride: tokens of a side that become one.
        padding: rings of zeros around the grid; (kernel − 1) / 2 if not given.
        norm: a norm before the convolution; null for none.
        bias: a bias in the convolution.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        kernel: Annotated[int, Field(gt=0)] = 3,
        stride: Annotated[int, Field(gt=0)] = 2,
        padding: Annotated[int | None, Field(ge=0)] = None,
        norm: Annotated[Any, Slot("norm", optional=True)] = None,
        bias: bool = True,
    ):
        super().__init__()
        self.norm = build("norm", norm, dim=dim) if norm is not None else None
        pad = (kernel - 1) // 2 if padding is None else padding
        self.conv = Convolution(dim, dim_out, kernel, stride, pad, bias)

    def forward(self, x_BTD: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return tokens(self.conv(x_BTD.transpose(1, 2).unflatten(2, grid)))

    def grid(self, grid: Grid) -> Grid:
        return extent(self.conv, grid[0]), extent(self.conv, grid[1])
