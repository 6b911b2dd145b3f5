"""Mixture of experts in which harder tokens get more of them.

    S(x) = the fewest experts with Σ_{e in S} p_e ≥ P,   p = softmax(W_r x)
    y = Σ_{e in S(x)} p_e · expert_e(x)
    L = balance · E Σ_e f_e p̄_e − entropy · mean_x Σ_e p_e log p_e,   f_e: tokens that have e

Axes: B batch, T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from core.registry import Slot, register
from model.feedforwards.moe import MoE
from model.routing import Routing, choose_top_p, entropy_loss, most_of
from model.stream import Stream


@register(
    "feedforward",
    "top_p_moe",
    paper="2403.07652",
    title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    cannot={"flops": "a token's experts depend on its values; the most it can get are counted"},
)
class TopPMoE(MoE):
    """As many experts as it takes for their shares to sum to a threshold (Huang et al. 2024).

    The entropy loss keeps the router from spreading its shares to reach for ever more experts. The
    paper reports 0.7% more average accuracy than top-2 with fewer than 90% of its activated
    parameters, and more experts in the lower layers. Parameters and operations are stated for the
    most experts a token can get, ⌈P · E⌉, which is what equal shares take.

    Args:
        experts: how many experts there are.
        threshold: P, what a token's shares must sum to.
        normalise: scale a token's weights to sum to one.
        balance: weight of the load-balancing loss.
        entropy: weight of the mean entropy of the tokens' shares.
        gated: experts are gated feed-forwards.
        ratio: an expert's hidden channels as a multiple of the width.
        width: an expert's hidden channels, instead of `ratio`.
        multiple_of: round an expert's hidden channels up to a multiple of this.
        activation: the experts' nonlinearity; the block's `activation` where that is set, or silu.
    """

    probe: ClassVar[dict[str, Any]] = {"experts": 4, "width": 16, "threshold": 0.6, "entropy": 0.01}

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        block_activation: Any = None,
        *,
        experts: Annotated[int, Field(gt=0)] = 16,
        threshold: Annotated[float, Field(gt=0, le=1)] = 0.4,
        normalise: bool = False,
        balance: Annotated[float, Field(ge=0)] = 0.01,
        entropy: Annotated[float, Field(ge=0)] = 0.0001,
        gated: bool = True,
        ratio: Annotated[float, Field(gt=0)] = 8 / 3,
        width: Annotated[int | None, Field(gt=0)] = None,
        multiple_of: Annotated[int, Field(gt=0)] = 1,
        activation: Annotated[Any, Slot("activation", optional=True)] = None,
    ):
        super().__init__(
            dim,
            layer,
            block_activation,
            experts=experts,
            top_k=most_of(threshold, experts),
            normalise=normalise,
            balance=balance,
            gated=gated,
            ratio=ratio,
            width=width,
            multiple_of=multiple_of,
            activation=activation,
        )
        self.threshold, self.entropy = threshold, entropy

    def route(self, logits_BTE: Tensor) -> Routing:
        return choose_top_p(logits_BTE, self.threshold, self.normalise)

    def _report(self, routing: Routing, dropped: Tensor, stream: Stream) -> None:
        super()._report(routing, dropped, stream)
        load_E = stream.metrics[f"moe/{self.layer}/load"]
        stream.metrics[f"moe/{self.layer}/experts_per_token"] = load_E.sum()
        if self.entropy:
            loss_B = self.entropy * entropy_loss(routing)
            stream.add_loss("moe_entropy", self.axis.ops.once(loss_B))
