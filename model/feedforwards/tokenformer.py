"""TokenFormer's feed-forward: attention over learned parameter tokens.

    S = x K_pᵀ,   A = gelu(τ S / ‖S‖₂),   y = A V_p

with n key-value pairs K_p, V_p: n×D and ‖·‖₂ over the n scores of a token.

Axes: B batch, T tokens, D width, N parameter tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from core.errors import UserError
from core.registry import register
from model.feedforwards.mlp import hidden_width
from model.leaves import Axis, ColumnLinear, RowLinear
from model.precision import at_least_float32
from model.stream import Stream


@register(
    "feedforward",
    "tokenformer",
    paper="2410.23168",
    title="TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters",
    aliases=["pattention"],
)
class TokenFormer(nn.Module):
    """Pattention in the place of the feed-forward (Wang et al. 2024).

    A trained model grows by pairs whose keys are zero: their scores are zero, so gelu gives zero
    and the norm does not move; with τ as before, the function is kept exactly (`grown`). The paper
    grows 124M parameters to 1.4B at a fraction of the cost of training from scratch. There,
    queries, keys, values and outputs of attention are pattention too; here they stay linear.

    Args:
        ratio: parameter tokens as a multiple of the width; the paper has 3 for its feed-forward.
        width: parameter tokens n, instead of `ratio`.
        tau_tokens: τ is the square root of this; n if not given. A grown model keeps its first n.
    """

    def __init__(
        self,
        dim: int,
        *,
        ratio: Annotated[float, Field(gt=0)] = 3.0,
        width: Annotated[int | None, Field(gt=0)] = None,
        tau_tokens: Annotated[int | None, Field(gt=0)] = None,
    ):
        super().__init__()
        tokens = hidden_width(dim, ratio, width, 1)
        self.tau = math.sqrt(tau_tokens or tokens)
        self.axis = Axis()
        self.keys = ColumnLinear(dim, tokens)
        self.values = RowLinear(tokens, dim)

    def forward(self, x_BTD: Tensor, stream: Stream | None = None) -> Tensor:
        scores_BTN = self.keys(x_BTD)
        wide_BTN = at_least_float32(scores_BTN)
        square_BT1 = self.axis.ops.split_sum(wide_BTN.square().sum(-1, keepdim=True))
        # A token whose scores are all zero has no direction; it gets zeros.
        unit_BTN = wide_BTN * torch.rsqrt(square_BT1.clamp_min(torch.finfo(torch.float32).tiny))
        weights_BTN = F.gelu(self.tau * unit_BTN).to(scores_BTN.dtype)
        y_BTD: Tensor = self.values(weights_BTN)
        return y_BTD


def grown(state: Mapping[str, Tensor], wider: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model with more parameter tokens that computes the same function.

    Args:
        state: the trained model's whole tensors by logical name.
        wider: a freshly initialised state of the larger model, whose `tau_tokens` is the trained
            model's n. Its new values are kept; its new keys become zero.

    Raises:
        UserError: if the two differ in anything but the number of parameter tokens.
    """
    if state.keys() != wider.keys():
        odd = sorted(state.keys() ^ wider.keys())[0]
        raise UserError(f"growing a TokenFormer: '{odd}' is in one of the two models only")
    result: dict[str, Tensor] = {}
    for name, old in state.items():
        new = wider[name].clone()
        axis = {"keys.weight": 0, "values.weight": 1}.get(".".join(name.split(".")[-2:]))
        if old.shape == new.shape:
            result[name] = old.clone()
            continue
        fits = axis is not None and all(
            a == b or (at == axis and a < b)
            for at, (a, b) in enumerate(zip(old.shape, new.shape, strict=True))
        )
        if not fits:
            raise UserError(
                f"growing a TokenFormer: '{name}' goes from {tuple(old.shape)} to "
                f"{tuple(new.shape)}; only its parameter tokens may grow"
            )
        assert axis is not None
        if axis == 0:
            new.zero_()
        new.narrow(axis, 0, old.shape[axis]).copy_(old)
        result[name] = new
    return result
