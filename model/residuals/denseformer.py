"""DenseFormer: after each block, a learned average over all earlier blocks' outputs.

    X_i = block_i(Y_{i−1}),   Y_i = Σ_{j ≤ i} α_ij X_j,   Y_0 = X_0: the embedding

Axes: B batch, T tokens, D width, j the depth of an output.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from core.registry import register
from model.leaves import Replicated
from model.residuals.base import Residual
from model.stream import Stream


class DenseResidual(Residual):
    """Keeps every block's output X_j in the stream; standard residuals within a block."""

    whole_stack = True
    index: int

    def begin(self, stream: Stream) -> None:
        stream.carried["dense.0"] = stream.hidden

    def read(self, stream: Stream) -> Tensor:
        return stream.hidden

    def write(self, stream: Stream, y_BTD: Tensor) -> None:
        stream.hidden = stream.hidden + y_BTD

    def close_block(self, stream: Stream) -> None:
        stream.carried[f"dense.{self.index + 1}"] = stream.hidden

    def finish(self, stream: Stream) -> None:
        stream.carried = {
            name: value for name, value in stream.carried.items() if not name.startswith("dense.")
        }


def weighted(weights: Tensor, states: list[Tensor]) -> Tensor:
    """Σ_j weights[..., j] · states[j]; summed one by one, so that no copy of all states is made."""
    total: Tensor = weights[..., :1] * states[0]
    for at, state in enumerate(states[1:], 1):
        total = total + weights[..., at : at + 1] * state
    return total


@register(
    "residual",
    "denseformer",
    paper="2402.02622",
    title="DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging",
)
class DenseFormer(DenseResidual):
    """Depth-weighted averages after the blocks (Pagliardini et al. 2024).

    It starts as the plain transformer (α_ii = 1, the others 0) and adds fewer parameters than the
    square of the depth. The paper reports the perplexity of much deeper transformers.

    Args:
        dilation: an average takes every so many-th output, backwards from its own.
        period: only every so many-th block is followed by an average.
    """

    def __init__(
        self,
        index: int = 0,
        last: bool = True,
        *,
        dilation: Annotated[int, Field(gt=0)] = 1,
        period: Annotated[int, Field(gt=0)] = 1,
    ):
        super().__init__()
        self.index, self.dilation = index, dilation
        self.alpha: Replicated | None = None
        if last and (index + 1) % period == 0:
            count = (index + 1) // dilation + 1
            self.alpha = Replicated(count, fill=lambda shape, generator: torch.eye(count)[-1])

    def close_block(self, stream: Stream) -> None:
        super().close_block(stream)
        if self.alpha is not None:
            own = self.index + 1
            depths = range(own % self.dilation, own + 1, self.dilation)
            states = [stream.carried[f"dense.{depth}"] for depth in depths]
            stream.hidden = weighted(self.alpha().to(stream.hidden.dtype), states)
