"""Learned absolute positions (Gehring et al. 2017; Devlin et al. 2018). Axes: B, T, D width."""

from __future__ import annotations

from torch import Tensor

from core.errors import UserError
from core.registry import register
from model.leaves import Replicated
from model.positions.base import Position, span


@register(
    "position",
    "learned",
    paper="1810.04805",
    title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
)
class LearnedPosition(Position):
    """A trained vector per position, added to the embedding. Longer inputs than trained raise."""

    place = "input"

    def __init__(self, dim: int, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.table = Replicated(max_length, dim)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
        if x_BTD.shape[1] > self.max_length:
            raise UserError(
                f"{x_BTD.shape[1]} tokens, but the learned positions end at {self.max_length}; "
                "shorten the input or train with a longer data.sequence"
            )
        rows: Tensor = self.table()[span(x_BTD.shape[1], positions_BT, x_BTD.device)]
        return x_BTD + rows.to(x_BTD.dtype)
