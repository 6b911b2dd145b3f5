"""No position: a causal decoder still tells order from what each token can see."""

from __future__ import annotations

from core.registry import register
from model.positions.base import Position


@register(
    "position",
    "none",
    aliases=["nope"],
    paper="2305.19466",
    title="The Impact of Positional Encoding on Length Generalization in Transformers",
)
class NoPosition(Position):
    """Nothing is added anywhere (Kazemnejad et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
