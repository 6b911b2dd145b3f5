"""Ladder residual (Zhang et al. 2025, 2501.06589).

    standard: x_i = x_{i−1} + f_i(x_{i−1})
    ladder:   x_i = x_{i−1} + f_i(x_{i−2}),  x_{−1} = x_0

A branch reads a stream that still lacks its predecessor's output, so under tensor parallelism the
predecessor's all-reduce can run while this branch computes. The output in flight is
`stream.pending`, hence pipeline stages carry it like everything else. Backward is the mirror image:
the gradient of y_i = f_i(x_{i−2}) is that of x_i, which f_{i+1} has no part in, so the sum of
f_{i+1}'s input gradient over the ranks can run while f_i's backward computes
(`parallel.collectives.late`). The paper reports 30% faster end-to-end inference at 70B parameters
and tensor parallelism 8; `python -m benchmarks.ladder` measures ours.

What reads a branch's output at once waits for it: a bias of its last linear, a layer scale, a
norm after the branch (`placement: sandwich`), dropout.
"""

from __future__ import annotations

from torch import Tensor

from core.registry import register
from model.residuals.base import Residual
from model.stream import Stream


@register(
    "residual",
    "ladder",
    paper="2501.06589",
    title="Ladder-residual: parallelism-aware architecture for accelerating large model inference "
    "with communication overlapping",
    aliases=["ladder_residual"],
)
class LadderResidual(Residual):
    """Each branch reads the stream without the previous branch's output."""

    defers = True

    def __init__(self) -> None:
        super().__init__()

    def read(self, stream: Stream) -> Tensor:
        return stream.hidden

    def write(self, stream: Stream, y_BTD: Tensor) -> None:
        stream.settle()
        stream.pending = y_BTD
