"""MUDDFormer: multiway dynamic dense connections.

After block i, whose output is X_i (X_0: the embedding), each token weighs all outputs so far for
each of the next block's four inputs c = q, k, v, r:

    w = W2 · gelu(W1 · rms(X_i)) + b,   X̄^c = Σ_{j ≤ i} w_cj X_j
    X_{i+1} = h + FFN(h),   h = X̄^r + Attention(X̄^q, X̄^k, X̄^v)

with W1: D → C(i+1), W2: C(i+1) → C(i+1), C = 4; after the last block C = 1.

Axes: B batch, T tokens, D width, C ways, j the depth of an output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.registry import build, register
from model.leaves import Replicated, ReplicatedLinear
from model.residuals.denseformer import DenseResidual, weighted
from model.stream import Stream

_WAYS = ("query", "key", "value")  # the residual's way is `hidden`


@register(
    "residual",
    "muddformer",
    paper="2502.12170",
    title="MUDDFormer: Breaking Residual Bottlenecks in Transformers via Multiway Dynamic Dense "
    "Connections",
    aliases=["mudd"],
)
class MUDDFormer(DenseResidual):
    """Queries, keys, values and the residual each read their own mix of all earlier outputs (Xiao
    et al. 2025).

    It starts as the plain transformer: W2 is zero and b takes the newest output alone. The three
    inputs of attention have norms of their own. The paper reports the performance of transformers
    trained with 1.8 to 2.4 times the compute, for 0.23% more parameters. Its feed-forwards also
    widen over the depth, which a pattern of blocks of different `ratio` expresses; its variant
    with norms before and after the mixing is not part of this.
    """

    defers = True

    def __init__(
        self, dim: int, index: int = 0, blocks: int = 1, branch: str = "mixer", last: bool = True
    ):
        super().__init__()
        self.index, self.last = index, last
        self.others = 2 if branch == "mixer" else 0
        if last:
            self.ways = 1 if index == blocks - 1 else 4
            self.depths = index + 2
            size = self.ways * self.depths
            self.norm = build("norm", {"name": "rmsnorm", "gain": False}, dim=dim)
            self.w1 = ReplicatedLinear(dim, size)
            self.w2 = ReplicatedLinear(size, size, fill="zeros")
            self.bias = Replicated(self.ways, self.depths, fill=_newest)

    def read(self, stream: Stream) -> Tensor:
        if self.others and "dense.query" in stream.carried:
            return stream.carried["dense.query"]
        return stream.hidden

    def read_others(self, stream: Stream) -> list[Tensor]:
        if not self.others:
            return []
        return [stream.carried.get(f"dense.{way}", stream.hidden) for way in _WAYS[1:]]

    def close_block(self, stream: Stream) -> None:
        super().close_block(stream)
        states = [stream.carried[f"dense.{depth}"] for depth in range(self.depths)]
        w = self.w2(F.gelu(self.w1(self.norm(stream.hidden))))
        w_BTCj = w.unflatten(-1, (self.ways, self.depths)) + self.bias().to(w.dtype)
        mixed = [weighted(w_BTCj[:, :, way], states) for way in range(self.ways)]
        stream.hidden = mixed[-1]
        for way, x_BTD in zip(_WAYS, mixed[:-1], strict=False):
            stream.carried[f"dense.{way}"] = x_BTD


def _newest(shape: torch.Size, generator: torch.Generator) -> Tensor:
    value = torch.zeros(shape)
    value[:, -1] = 1
    return value
