"""Rotary position embedding (Su et al. 2021, 2104.09864). Axes: B, T, H heads, K head width."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from core.registry import register
from model.positions.base import Position, span
from model.precision import at_least_float32


@register(
    "position",
    "rope",
    paper="2104.09864",
    title="RoFormer: Enhanced Transformer with Rotary Position Embedding",
)
class RoPE(Position):
    """Rotates pair i of each head by position · base^(−2i/K), so scores see distances only.

    Channel i is paired with channel i + R/2, R = fraction·K rotated channels (the layout of Llama
    and GPT-NeoX checkpoints). Angles are computed in float32.

    Args:
        base: the slowest wavelength is 2π·base positions.
        fraction: the share of each head's channels that is rotated.
    """

    place = "attention"

    def __init__(
        self,
        head_dim: int,
        *,
        base: Annotated[float, Field(gt=1)] = 10_000.0,
        fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ):
        super().__init__()
        self.base = base
        self.rotated = int(head_dim * fraction) // 2 * 2

    def rotate(
        self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        positions = span(q_BTHK.shape[1], positions_BT, q_BTHK.device)
        pairs = torch.arange(0, self.rotated, 2, device=q_BTHK.device, dtype=torch.float32)
        angle_BTK = positions[..., None].float() * self.base ** (-pairs / self.rotated)
        cos, sin = angle_BTK.cos()[:, :, None], angle_BTK.sin()[:, :, None]
        return self._turn(q_BTHK, cos, sin), self._turn(k_BTHK, cos, sin)

    def _turn(self, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x_BTHK[..., : self.rotated], x_BTHK[..., self.rotated :]
        first, second = at_least_float32(turned).chunk(2, dim=-1)
        out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        out = out.to(x_BTHK.dtype)
        return torch.cat((out, kept), dim=-1) if kept.shape[-1] else out
