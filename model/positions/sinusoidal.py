"""Sinusoidal absolute positions (Vaswani et al. 2017, 1706.03762). Axes: B, T, D width."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from core.errors import UserError
from core.registry import register
from model.positions.base import Position, span


@register(
    "position",
    "sinusoidal",
    paper="1706.03762",
    title="Attention Is All You Need",
    aliases=["sincos"],
)
class SinusoidalPosition(Position):
    """Channel 2i of position p is sin(p · base^(−2i/D)), channel 2i + 1 the cosine.

    On an image's grid, half of the channels tell the row and half the column, each as all sines
    followed by all cosines (He et al. 2021, 2111.06377); tokens before the patches, such as a class
    token, get zeros.

    Args:
        base: the slowest wavelength is 2π·base positions.
    """

    place = "input"

    def __init__(
        self,
        dim: int,
        max_length: int | None = None,
        grid: tuple[int, int] | None = None,
        *,
        base: Annotated[float, Field(gt=1)] = 10_000.0,
    ):
        super().__init__()
        parts = 2 if grid is None else 4
        if dim % parts:
            where = "" if grid is None else " on a grid"
            raise UserError(
                f"sinusoidal positions{where} need a width that is a multiple of {parts}; got {dim}"
            )
        self.dim, self.base, self.grid = dim, base, grid
        patches = grid[0] * grid[1] if grid is not None else 0
        self.prefix = max(0, (max_length or 0) - patches) if grid is not None else 0

    def embed(self, x_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
        at_BT = span(x_BTD.shape[1], positions_BT, x_BTD.device)
        rows_BTD = self._line(at_BT) if self.grid is None else self._plane(at_BT, self.grid[1])
        return x_BTD + rows_BTD.to(x_BTD.dtype)

    def _angles(self, at_BT: Tensor, width: int) -> Tensor:
        """The angles of `width` channels, [B, T, width / 2], in float32."""
        pairs = torch.arange(0, width, 2, device=at_BT.device, dtype=torch.float32)
        return at_BT[..., None].float() * self.base ** (-pairs / width)

    def _line(self, at_BT: Tensor) -> Tensor:
        angle = self._angles(at_BT, self.dim)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)

    def _plane(self, at_BT: Tensor, columns: int) -> Tensor:
        patch_BT = at_BT - self.prefix
        halves = []
        for place_BT in (patch_BT // columns, patch_BT % columns):
            angle = self._angles(place_BT, self.dim // 2)
            halves += [angle.sin(), angle.cos()]
        return torch.cat(halves, dim=-1) * (patch_BT >= 0)[..., None]
