"""DeepSeek-V3's mixture of experts: sigmoid scores, balanced without a loss, few nodes a token.

s_e = sigmoid(w_e · x),   chosen: top-k of s + b within the top groups
y = shared(x) + scale · Σ_e (s_e / Σ s) · expert_e(x)
after each step  b_e += u · sign(mean load − load_e)
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from core.registry import Slot, register
from model.feedforwards.moe import MoE


@register("feedforward", "deepseek_moe", paper="2412.19437", title="DeepSeek-V3 Technical Report")
class DeepSeekMoE(MoE):
    """Many narrow experts, biases that keep them evenly loaded, and a shared one (DeepSeek-AI
    2024).

    Defaults are the paper's, for a width of 7,168. `moe` has all of it as options; the paper's
    earlier form (2405.04434) is `moe` with softmax scores and group_best 1. Balancing by biases is
    due to Wang et al. 2024 (2408.15664), who report lower loss and more even load than with a
    balance loss.

    Args:
        experts: how many experts are routed to.
        top_k: how many of them each token goes to.
        shared: how many more see every token.
        groups: so many equal groups of neighbouring experts, one for each node.
        top_groups: a token's experts come from this many groups.
        scale: multiplies the routed experts' normalised weights.
        bias_update: by how much a bias moves after each optimizer step.
        balance: weight of the sequence-wise balance loss, which guards against extreme samples.
        ratio: an expert's hidden channels as a multiple of the width.
        width: an expert's hidden channels, instead of `ratio`.
        multiple_of: round an expert's hidden channels up to a multiple of this.
        activation: the experts' nonlinearity; the block's `activation` where that is set, or silu.
    """

    probe: ClassVar[dict[str, Any]] = {
        "experts": 8,
        "top_k": 2,
        "groups": 4,
        "top_groups": 2,
        "width": 16,
        "balance": 0.1,
    }

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        block_activation: Any = None,
        *,
        experts: Annotated[int, Field(gt=0)] = 256,
        top_k: Annotated[int, Field(gt=0)] = 8,
        shared: Annotated[int, Field(ge=0)] = 1,
        groups: Annotated[int, Field(gt=0)] = 8,
        top_groups: Annotated[int | None, Field(gt=0)] = 4,
        scale: Annotated[float, Field(gt=0)] = 2.5,
        bias_update: Annotated[float, Field(ge=0)] = 0.001,
        balance: Annotated[float, Field(ge=0)] = 0.0001,
        ratio: Annotated[float, Field(gt=0)] = 2 / 7,
        width: Annotated[int | None, Field(gt=0)] = None,
        multiple_of: Annotated[int, Field(gt=0)] = 1,
        activation: Annotated[Any, Slot("activation", optional=True)] = None,
    ):
        super().__init__(
            dim,
            layer,
            block_activation,
            experts=experts,
            top_k=top_k,
            shared=shared,
            score="sigmoid",
            scale=scale,
            groups=groups,
            top_groups=top_groups,
            bias_update=bias_update,
            balance=balance,
            balance_over="sample",
            ratio=ratio,
            width=width,
            multiple_of=multiple_of,
            activation=activation,
        )
