"""The two-layer feed-forward. Axes: B batch, T tokens, D width, F hidden channels."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from core.registry import Slot, build, register
from model.leaves import ColumnLinear, Dropout, RowLinear
from model.norms.split import split_norm
from model.stream import Stream


def hidden_width(dim: int, ratio: float, width: int | None, multiple_of: int) -> int:
    """F: `width`, or `ratio`·D rounded up to a multiple."""
    if width is not None:
        return width
    return -(-round(ratio * dim) // multiple_of) * multiple_of


@register("feedforward", "mlp", paper="1706.03762", title="Attention Is All You Need")
class MLP(nn.Module):
    """W2 · act(W1 · x + b1) + b2 (Vaswani et al. 2017).

    Args:
        ratio: hidden channels as a multiple of the width.
        width: hidden channels, instead of `ratio`.
        multiple_of: round the hidden channels up to a multiple of this.
        bias: use biases.
        activation: the nonlinearity; the block's `activation` where that is set.
        mid_norm: a norm over the hidden channels before the second matrix (2110.09456, 2210.06423);
            rmsnorm or layernorm.
        dropout: dropout on the hidden channels.
    """

    def __init__(
        self,
        dim: int,
        block_activation: Any = None,
        *,
        ratio: Annotated[float, Field(gt=0)] = 4.0,
        width: Annotated[int | None, Field(gt=0)] = None,
        multiple_of: Annotated[int, Field(gt=0)] = 1,
        bias: bool = True,
        activation: Annotated[Any, Slot("activation", optional=True)] = None,
        mid_norm: Annotated[Any, Slot("norm", optional=True)] = None,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ):
        super().__init__()
        hidden = hidden_width(dim, ratio, width, multiple_of)
        self.up = ColumnLinear(dim, hidden, bias)
        self.activation = build("activation", activation or block_activation or "gelu", dim=hidden)
        self.mid_norm = split_norm(mid_norm, hidden) if mid_norm is not None else None
        self.dropout = Dropout(dropout)
        self.down = RowLinear(hidden, dim, bias)

    def forward(self, x_BTD: Tensor, stream: Stream | None = None) -> Tensor:
        h_BTF = self.activation(self.up(x_BTD))
        if self.mid_norm is not None:
            h_BTF = self.mid_norm(h_BTF)
        y_BTD: Tensor = self.down(self.dropout(h_BTF))
        return y_BTD
