"""The position protocol. Axes: B batch, T tokens, D width, H heads, K head width.

A position works in one place: "input" (a table added once, after the embedding) or "attention"
(inside each attention layer: rotating queries and keys, or biasing scores).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.registry import resolve


class Position(nn.Module):
    """Base: does nothing. Subclasses set `place` and override what they need."""

    place: Literal["input", "attention", "none"] = "none"
    biases: bool = False
    """Whether `bias` adds to the scores."""

    def embed(self, x_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
        """At the input, on the whole sequence: x with positions added."""
        return x_BTD

    def rotate(
        self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """In attention: queries and keys with their positions in them."""
        return q_BTHK, k_BTHK

    def per_head(self) -> Tensor:
        """What the bias is made of, [H, …] of this rank's heads."""
        raise NotImplementedError

    def form(self, per_head: Tensor, queries_BT: Tensor, keys_BS: Tensor) -> Tensor:
        """In attention: what is added to the scores of these heads, [B or 1, H, T, S]."""
        raise NotImplementedError

    def bias(self, queries_BT: Tensor, keys_BS: Tensor) -> Tensor:
        """In attention: what is added to the scores, [B or 1, H, T, S]."""
        return self.form(self.per_head(), queries_BT, keys_BS)


def span(tokens: int, positions_BT: Tensor | None, device: torch.device) -> Tensor:
    """The positions, or 0…T−1 as one row where there are none."""
    if positions_BT is not None:
        return positions_BT
    return torch.arange(tokens, device=device)[None]


def position_for(
    place: Literal["input", "attention"], spec: Any, **context: Any
) -> Position | None:
    """The position a config names, if it works in this place; else None."""
    if isinstance(spec, Position):
        return spec if spec.place == place else None
    config = resolve("position", spec)
    if getattr(config.entry.target, "place", None) != place:
        return None
    position: Position = config.build(**context)
    return position
