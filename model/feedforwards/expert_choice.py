"""Mixture of experts in which experts choose their tokens.

    S = softmax(x W_r) over experts,   G, I = top-C(Sᵀ) over a sample's tokens,
    y_t = Σ_{e: t ∈ I_e} G_et · expert_e(x_t),   C = c · T / E

Axes: B batch, T tokens, D width, E experts, C tokens an expert takes from a sample.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from core.registry import Slot, register
from model.context import Need
from model.experts import Experts
from model.feedforwards.mlp import hidden_width
from model.leaves import Axis
from model.routing import Router
from model.stream import Stream


@register(
    "feedforward",
    "expert_choice",
    paper="2202.09368",
    title="Mixture-of-Experts with Expert Choice Routing",
    cannot={
        "decoder": "an expert ranks a token among all of the sequence, later ones included, so "
        "what a token gets would depend on its future"
    },
)
class ExpertChoice(nn.Module):
    """Every expert computes equally many tokens; a token gets none, one or several (Zhou et al.
    2022).

    The load is even by construction, so there is no balance loss. Experts choose among the tokens
    of one sample, where the paper lets them choose in the whole batch: so a sample's result does
    not depend on its neighbours, nor on how a batch is divided. The paper reports convergence more
    than twice as fast as with token choice.

    Args:
        experts: how many experts there are.
        capacity_factor: c, how many experts a token has on average.
        gated: experts are gated feed-forwards.
        ratio: an expert's hidden channels as a multiple of the width.
        width: an expert's hidden channels, instead of `ratio`.
        multiple_of: round an expert's hidden channels up to a multiple of this.
        activation: the experts' nonlinearity; the block's `activation` where that is set, or gelu.
    """

    context: Need = "gather"  # an expert chooses among all tokens
    probe = {"experts": 4, "ratio": 2.0}

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        block_activation: Any = None,
        *,
        experts: Annotated[int, Field(gt=0)] = 8,
        capacity_factor: Annotated[float, Field(gt=0)] = 2.0,
        gated: bool = False,
        ratio: Annotated[float, Field(gt=0)] = 4.0,
        width: Annotated[int | None, Field(gt=0)] = None,
        multiple_of: Annotated[int, Field(gt=0)] = 1,
        activation: Annotated[Any, Slot("activation", optional=True)] = None,
    ):
        super().__init__()
        self.layer, self.factor = layer, capacity_factor
        hidden = hidden_width(dim, ratio, width, multiple_of)
        self.axis = Axis()
        self.router = Router(dim, experts)
        self.experts = Experts(
            experts, dim, hidden, gated, activation or block_activation or "gelu"
        )

    @property
    def active_fraction(self) -> float:
        """The share of the expert banks that a token uses on average."""
        return min(1.0, self.factor / self.experts.experts)

    def capacity(self, tokens: int) -> int:
        """How many of a sample's tokens each expert takes."""
        return min(tokens, max(1, round(self.factor * tokens / self.experts.experts)))

    def forward(self, x_BTD: Tensor, stream: Stream | None = None) -> Tensor:
        shares_BTE = self.router(x_BTD).softmax(-1)
        weights_BEC, taken_BEC = shares_BTE.transpose(1, 2).topk(self.capacity(x_BTD.shape[1]))
        # Rows of all samples, one behind another.
        first_B11 = torch.arange(x_BTD.shape[0], device=x_BTD.device)[:, None, None]
        row_EP = (taken_BEC + first_B11 * x_BTD.shape[1]).transpose(0, 1).flatten(1)
        x_ND = x_BTD.flatten(0, 1)
        y_EPD = self.experts.each(x_ND[row_EP])
        weighted_EPD = y_EPD * weights_BEC.transpose(0, 1).flatten(1)[..., None].to(y_EPD.dtype)
        y_ND = y_EPD.new_zeros(x_ND.shape).index_add(
            0, row_EP.flatten(), weighted_EPD.flatten(0, 1)
        )
        if stream is not None:
            reached_N = torch.zeros_like(x_ND[:, 0]).index_fill(0, row_EP.flatten(), 1)
            stream.metrics[f"moe/{self.layer}/dropped"] = 1 - reached_N.mean().detach()
        y_BTD: Tensor = self.axis.ops.leave(y_ND.view(x_BTD.shape).to(x_BTD.dtype))
        return y_BTD

    def flops(self, x_BTD: Tensor, stream: Stream | None = None) -> int:
        """Forward operations of the router and of every expert's tokens."""
        taken = x_BTD.shape[0] * self.experts.experts * self.capacity(x_BTD.shape[1])
        return self.router.flops(x_BTD) + self.experts.flops(taken)
