"""Attention in windows of an image's grid, shifted in every other block.

Axes: B batch, T tokens of the grid, N windows, W tokens of a window, D width, H heads,
K head width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from core.errors import UserError
from core.registry import register
from model.attention import Backend, Scores, attend
from model.leaves import ColumnLinear, RowLinear
from model.mixers.base import Mixer, image_grid
from model.positions.base import position_for
from model.stream import Stream

Grid = tuple[int, int]


@register(
    "mixer",
    "window_attention",
    paper="2103.14030",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    aliases=["swin", "shifted_window"],
    cannot={"language": "windows are cut from the grid of an image's tokens"},
)
class WindowAttention(Mixer):
    """Attention within squares of tokens (Liu et al. 2021).

    A shifted block moves the image up and left by half a window, so that windows join what the
    block before kept apart; tokens that meet only because the image wraps around do not see each
    other. A window is no larger than the grid, and along an axis that one window covers there is
    no shift. A grid that windows do not divide is first filled up with zeros, below and on the
    right, which are seen as tokens, as in the authors' code. Positions count within the window.

    Args:
        window: side of a window in tokens.
        shift: auto shifts every second block of a stage; none and half decide it.
        heads: heads; D / head_dim if not given.
        head_dim: width of a head; D / heads if not given, and 32 if neither is.
        bias: biases in the query, key and value projections.
        dropout: dropout on the attention weights.
        backend: as in attention.
    """

    # Without biases: a key's bias moves no output, so its gradient is rounding alone.
    probe = {"window": 2, "heads": 4, "bias": False}

    def __init__(
        self,
        dim: int,
        grid: Grid | None = None,
        index: int = 0,
        position: Any = "none",
        max_length: int | None = None,
        *,
        window: Annotated[int, Field(gt=0)] = 7,
        shift: Literal["auto", "none", "half"] = "auto",
        heads: Annotated[int | None, Field(gt=0)] = None,
        head_dim: Annotated[int | None, Field(gt=0)] = None,
        bias: bool = True,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.grid = image_grid("window_attention", grid, max_length)
        if heads is None:
            heads = dim // (head_dim or 32)
        if heads == 0 or (head_dim is None and dim % heads):
            raise UserError(f"window_attention: dim ({dim}) must be a multiple of heads ({heads})")
        self.heads, self.head_dim = heads, head_dim or dim // heads
        self.window = (min(window, self.grid[0]), min(window, self.grid[1]))
        self.shifts = shift == "half" or (shift == "auto" and index % 2 == 1)
        self.dropout, self.backend = dropout, backend
        width = self.heads * self.head_dim
        self.q = ColumnLinear(dim, width, bias)
        self.k = ColumnLinear(dim, width, bias)
        self.v = ColumnLinear(dim, width, bias)
        self.position = position_for(
            "attention",
            position,
            dim=dim,
            heads=self.heads,
            head_dim=self.head_dim,
            grid=self.window,
            max_length=self.window[0] * self.window[1],
            causal=False,
        )
        self.out = RowLinear(width, dim, bias=True)

    def forward(self, x_BTD: Tensor, stream: Stream) -> Tensor:
        grid = image_grid("window_attention", stream.grid, x_BTD.shape[1])
        window = (min(self.window[0], grid[0]), min(self.window[1], grid[1]))
        shift = self._shift(grid, window)
        x = x_BTD.unflatten(1, grid)
        x = F.pad(x, (0, 0, 0, -grid[1] % window[1], 0, -grid[0] % window[0]))
        filled = (x.shape[1], x.shape[2])
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        x_NWD, windows = cut(x, window)  # B·N windows first

        q, k, v = (p(x_NWD).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        bias = None
        if self.position is not None:
            at_1W = self._positions(window, x.device)
            q, k = self.position.rotate(q, k, at_1W)
            if self.position.biases:
                bias = self.position.bias(at_1W, at_1W)
        if any(shift):
            key = f"window:{filled}:{window}:{shift}"
            if key not in stream.scratch:
                stream.scratch[key] = apart(filled, window, shift, x.device)
            apart_NWW = stream.scratch[key]
            if bias is None:
                bias = q.new_zeros(1, q.shape[2], *apart_NWW.shape[1:])
            bias = bias.masked_fill(apart_NWW[:, None], -math.inf)
        if bias is not None:
            bias = bias.expand(windows, -1, -1, -1).flatten(0, 1)[None]
        # Windows stand beside the heads, so that one bias serves the whole batch.
        q, k, v = (p.unflatten(0, (-1, windows)).transpose(2, 3).flatten(1, 2) for p in (q, k, v))
        scores = Scores(bias=bias, dropout=self.dropout if self.training else 0.0)
        y = attend(q, k, v, scores, self.backend)
        y = y.unflatten(1, (windows, -1)).transpose(2, 3).flatten(3)

        y = join(y, filled, window)
        if any(shift):
            y = y.roll(shift, (1, 2))
        y_BTD: Tensor = self.out(y[:, : grid[0], : grid[1]].flatten(1, 2))
        return y_BTD

    def _shift(self, grid: Grid, window: Grid) -> Grid:
        if not self.shifts:
            return 0, 0
        down, right = (
            0 if side <= part else part // 2 for side, part in zip(grid, window, strict=True)
        )
        return down, right

    def _positions(self, window: Grid, device: torch.device) -> Tensor:
        """Places of a window's tokens in the window that was built, one row."""
        rows = torch.arange(window[0], device=device)[:, None]
        return (rows * self.window[1] + torch.arange(window[1], device=device)).flatten()[None]

    def math_flops(self, batch: int, tokens: int) -> int:
        rows, columns = (-(-g // w) for g, w in zip(self.grid, self.window, strict=True))
        area = self.window[0] * self.window[1]
        return 4 * batch * rows * columns * area * area * self.heads * self.head_dim


def cut(x_BRCD: Tensor, window: Grid) -> tuple[Tensor, int]:
    """A grid of rows R and columns C → windows [B·N, W, D], and how many windows an image has."""
    x = x_BRCD.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    x = x.transpose(2, 3)  # B, windows down, windows across, rows, columns, D
    return x.flatten(3, 4).flatten(0, 2), x.shape[1] * x.shape[2]


def join(x_BNWD: Tensor, grid: Grid, window: Grid) -> Tensor:
    """Windows back to the grid they were cut from, [B, R, C, D]."""
    x = x_BNWD.unflatten(2, window).unflatten(1, (grid[0] // window[0], -1))
    x_BRCD: Tensor = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x_BRCD


def apart(grid: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """True where two tokens of a shifted window were not neighbours in the image, [N, W, W].

    Along each axis the last window holds tokens from both ends of the image, parted at `shift`
    from its end.
    """
    region = torch.zeros(1, *grid, 1, dtype=torch.long, device=device)
    for axis in (0, 1):
        at = torch.arange(grid[axis], device=device)
        wrapped = (at >= grid[axis] - shift[axis]) if shift[axis] else torch.zeros_like(at)
        region = 2 * region + wrapped.long().view((1, -1, 1, 1) if axis == 0 else (1, 1, -1, 1))
    region_NW = cut(region, window)[0].squeeze(-1)
    return region_NW[:, :, None] != region_NW[:, None, :]
