"""Mixture of hidden dimensions: a gated feed-forward on few sub-dimensions of the width.

    y = Pᵀ L P R · (W_down · (act(W_gate z) ⊙ W_up z) on rows A, 0 elsewhere),   z = α g ⊙ x

A, g, α and the fusion are in model/subdimensions.py.

Axes: B batch, T tokens, D width, F hidden channels.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from core.registry import Slot, build, register
from model.feedforwards.mlp import hidden_width
from model.stream import Stream
from model.subdimensions import Reads, Select, Writes, divide


@register(
    "feedforward",
    "mohd",
    paper="2412.05644",
    title="Mixture of Hidden-Dimensions Transformer",
)
class MoHD(nn.Module):
    """A token is read from, and written to, the sub-dimensions it has of the width (Chen et al.
    2024).

    Those that all tokens share and those that a router chooses for it; the hidden channels stay
    whole. The mixer of the same name does it to attention, and the paper uses both. It reports 1.7%
    more on ten language tasks with half of the activated parameters (compression: delta 0.5 or
    0.75), and 3.7% more with three times the parameters at the activated ones of the narrow model
    (expansion 2, 3 or 4 with delta 1; `dim` is then that many times the narrow model's).

    The product is done for the active sub-dimensions alone. The embedding, the norms, the residual
    stream and the head keep the whole width, so an expanded model pays for a wider head. The
    paper's other form, which divides the hidden channels of a feed-forward, is not here.

    Args:
        sub_dimensions: how many sub-dimensions the width has at expansion 1.
        expansion: the width is so many times that of the model whose cost it keeps, and has so many
            times its sub-dimensions; hidden channels follow the narrow width.
        delta: a token has this times `sub_dimensions`.
        shared: which part of those is the same for all tokens.
        fusion: mix what was written, by a Monarch matrix that starts as the identity.
        balance: weight of the loss that evens out how often each sub-dimension is chosen.
        ratio: hidden channels as a multiple of the width before expansion.
        width: hidden channels, instead of `ratio`.
        multiple_of: round the hidden channels up to a multiple of this.
        activation: the gate's nonlinearity; the block's `activation` where that is set, or silu.
    """

    # 8 sub-dimensions of 4 channels: 2 shared, 2 of the other 6 chosen.
    probe: ClassVar[dict[str, Any]] = {"sub_dimensions": 8, "shared": 0.5, "ratio": 2.0}

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        block_activation: Any = None,
        *,
        sub_dimensions: Annotated[int, Field(gt=0)] = 16,
        expansion: Annotated[int, Field(gt=0)] = 1,
        delta: Annotated[float, Field(gt=0, le=1)] = 0.5,
        shared: Annotated[float, Field(gt=0, le=1)] = 0.75,
        fusion: bool = True,
        balance: Annotated[float, Field(ge=0)] = 0.01,
        ratio: Annotated[float, Field(gt=0)] = 8 / 3,
        width: Annotated[int | None, Field(gt=0)] = None,
        multiple_of: Annotated[int, Field(gt=0)] = 1,
        activation: Annotated[Any, Slot("activation", optional=True)] = None,
    ):
        super().__init__()
        self.division = divide(dim, sub_dimensions, expansion, delta, shared)
        hidden = hidden_width(dim // expansion, ratio, width, multiple_of)
        self.select = Select(dim, self.division, balance, "mohd_balance", f"mohd/{layer}")
        self.reads = Reads(self.division, {"gate": hidden, "up": hidden})
        chosen = activation or block_activation or "silu"
        self.activation = build("activation", chosen, dim=hidden)
        self.writes = Writes(self.division, hidden, fusion)

    @property
    def active_fraction(self) -> float:
        """The share of the banks of sub-dimensions that one token uses."""
        return self.division.active_fraction

    def forward(self, x_BTD: Tensor, stream: Stream | None = None) -> Tensor:
        active = self.select(x_BTD, stream)
        gate_BTF, up_BTF = self.reads(active)
        y_BTD: Tensor = self.writes(self.activation(gate_BTF) * up_BTF, active)
        return y_BTD.to(x_BTD.dtype)

    def flops(self, x_BTD: Tensor, stream: Stream | None = None) -> int:
        """Forward operations of the router, of what is active, and of the fusion."""
        tokens = x_BTD.numel() // x_BTD.shape[-1]
        parts = self.reads.operations(tokens) + self.writes.operations(tokens)
        return self.select.router.flops(x_BTD) + parts
