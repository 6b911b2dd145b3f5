"""MatFormer: a feed-forward whose narrower forms are parts of it.

    T_i(x) = W2[:, S_i] act(W1[S_i] x),   S_1 ⊂ S_2 ⊂ … ⊂ S_g: all F channels

The published S_i are the first m_i channels. Here they are the first few of every `levels[-1]`
neighbours, the same up to the order of channels, so that ranks that split the channels hold the
same share of each form.

Axes: B batch, T tokens, D width, F hidden channels, M those of one form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from core.errors import UserError
from core.hashing import stable_hash
from core.registry import Slot, build, register
from model.feedforwards.mlp import hidden_width
from model.leaves import ColumnLinear, RowLinear
from model.stream import Stream


@register(
    "feedforward",
    "matformer",
    paper="2310.07707",
    title="MatFormer: Nested Transformer for Elastic Inference",
    aliases=["nested"],
)
class MatFormer(nn.Module):
    """Nested feed-forwards, one of which is trained in each step (Devvrit et al. 2023).

    In training each optimizer step draws one form, the same in all layers and on all ranks, a
    function of the run's seed and the step; outside a run it is the widest. In inference `serve`
    says which form computes. `extracted` cuts a smaller model out of a trained one, with a form of
    its own for each layer where wanted. The paper's model of 2.6B gives sub-models from 1.5B on
    that match ones trained by themselves.

    Args:
        ratio: hidden channels of the widest form as a multiple of the width.
        width: hidden channels of the widest form, instead of `ratio`.
        levels: how many of every `levels[-1]` neighbouring channels each form has, ascending.
        serve: which of the levels computes in inference, from 0; the widest if not given.
        train: uniform draws a level for each step; serve trains the level `serve` alone.
        gated: a gated feed-forward.
        activation: the nonlinearity; the block's `activation` where that is set.
    """

    probe = {"ratio": 2.0, "serve": 2, "train": "serve"}

    def __init__(
        self,
        dim: int,
        block_activation: Any = None,
        *,
        ratio: Annotated[float, Field(gt=0)] = 4.0,
        width: Annotated[int | None, Field(gt=0)] = None,
        levels: list[Annotated[int, Field(gt=0)]] = [1, 2, 4, 8],  # noqa: B006
        serve: Annotated[int | None, Field(ge=0)] = None,
        train: Annotated[str, Field(pattern="^(uniform|serve)$")] = "uniform",
        gated: bool = False,
        activation: Annotated[Any, Slot("activation", optional=True)] = None,
    ):
        super().__init__()
        hidden = hidden_width(dim, ratio, width, 1)
        if not levels or levels != sorted(set(levels)):
            raise UserError(f"matformer: levels {levels} must ascend")
        if hidden % levels[-1]:
            raise UserError(
                f"matformer: {hidden} hidden channels are not a multiple of levels[-1] "
                f"({levels[-1]}); set width to {-(-hidden // levels[-1]) * levels[-1]}"
            )
        if serve is not None and serve >= len(levels):
            raise UserError(f"matformer: serve ({serve}) must be below {len(levels)}, from 0")
        self.levels, self.hidden, self.draws = tuple(levels), hidden, train == "uniform"
        self.serve = len(levels) - 1 if serve is None else serve
        self.drawn = len(levels) - 1
        self.gate = ColumnLinear(dim, hidden) if gated else None
        self.up = ColumnLinear(dim, hidden)
        self.activation = build("activation", activation or block_activation or "gelu", dim=hidden)
        self.down = RowLinear(hidden, dim)

    def begin_step(self, seed: int, step: int) -> None:
        """Draw the form that this optimizer step trains, alike in every layer."""
        self.drawn = stable_hash("matformer", seed, step) % len(self.levels)

    @property
    def level(self) -> int:
        return self.drawn if self.training and self.draws else self.serve

    def forward(self, x_BTD: Tensor, stream: Stream | None = None) -> Tensor:
        part, group = self.levels[self.level], self.levels[-1]
        up_MD = nested(self.up.value("weight"), 0, part, group)
        h_BTM = F.linear(x_BTD, up_MD)
        if self.gate is None:
            h_BTM = self.activation(h_BTM)
        else:
            gate_MD = nested(self.gate.value("weight"), 0, part, group)
            h_BTM = self.activation(F.linear(x_BTD, gate_MD)) * h_BTM
        down_DM = nested(self.down.value("weight"), 1, part, group)
        y_BTD: Tensor = self.down.ops.leave(F.linear(h_BTM, down_DM))
        return y_BTD

    def split_sizes(self) -> dict[str, int]:
        """What tensor parallelism must divide."""
        return {"groups of hidden channels": self.hidden // self.levels[-1]}

    def flops(self, x_BTD: Tensor, stream: Stream | None = None) -> int:
        """Forward operations of the form that computes."""
        channels = self.hidden // self.levels[-1] * self.levels[self.level]
        return 2 * x_BTD.numel() * channels * (2 if self.gate is None else 3)


def nested(weight: Tensor, dim: int, part: int, group: int) -> Tensor:
    """The first `part` of every `group` neighbours along `dim`."""
    if part == group:
        return weight
    kept: Tensor = weight.unflatten(dim, (-1, group)).narrow(dim + 1, 0, part)
    return kept.flatten(dim, dim + 1)


def extracted(
    state: Mapping[str, Tensor], levels: list[int], choice: int | list[int]
) -> dict[str, Tensor]:
    """The state of a smaller model, cut out of a trained MatFormer's.

    The result loads into a model whose feed-forwards are `mlp` without bias (or, gated, `glu` with
    the same activation) of the extracted width, in each layer.

    Args:
        state: whole tensors by logical name.
        levels: the option `levels` of the trained model.
        choice: which level to keep, from 0, for all layers or one for each (Mix'n'Match; the paper
            finds that choices which do not decrease over the depth work well).

    Raises:
        UserError: if `choice` does not name a level for every layer with a MatFormer.
    """
    ends = ("feedforward.branch.up.weight", "feedforward.branch.gate.weight")
    last = "feedforward.branch.down.weight"
    layers: dict[str, int] = {}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.endswith((*ends, last)):
            result[name] = value.clone()
            continue
        layer = layers.setdefault(name.rpartition(".branch.")[0], len(layers))
        chosen = choice if isinstance(choice, int) else choice[layer : layer + 1]
        if isinstance(chosen, list):
            if not chosen:
                raise UserError(f"extracting a MatFormer: no level is chosen for layer {layer}")
            chosen = chosen[0]
        if not 0 <= chosen < len(levels):
            raise UserError(f"extracting a MatFormer: level {chosen} is not in 0…{len(levels) - 1}")
        dim = 1 if name.endswith(last) else 0
        result[name] = nested(value, dim, levels[chosen], levels[-1]).clone()
    if isinstance(choice, list) and len(choice) != len(layers):
        raise UserError(
            f"extracting a MatFormer: {len(choice)} levels are chosen for {len(layers)} layers"
        )
    return result
