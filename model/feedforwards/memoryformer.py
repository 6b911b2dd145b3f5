"""MemoryFormer's feed-forward: tables looked up by the signs of the input.

An input of C channels is cut into K = C/t chunks z of t numbers; each has a table of 2^t rows:

    y = b + Σ_k s(z_k) T_k[h(z_k)],   h(z): the bits z_i ≥ 0, the first one highest,
    s(z) = Σ_i |z_i| / Π_i (1 + exp(−2|z_i|))

s is the product of z with the corner of {−1, 1}^t nearest to it, times that corner's share in a
softmax of these products over all corners.

Axes: B batch, T tokens, D width, C channels, K chunks, R = 2^t rows, O outputs, N any leading axes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from core.errors import UserError
from core.registry import register
from model.feedforwards.hidden import HiddenLayerNorm
from model.leaves import Leaf
from model.precision import at_least_float32
from model.roles import Role
from model.stream import Stream


def _small(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return 0.001 * torch.randn(shape, generator=generator)


class MemoryLayer(Leaf):
    """Chunks N,K,t → N,O by tables K,R,O; `split` divides the outputs or the chunks over ranks."""

    def __init__(self, chunks: int, bits: int, outputs: int, split: Literal["column", "row"]):
        super().__init__()
        self.bits, self.by_chunk = bits, split == "row"
        self.add(
            "weight",
            (chunks, 2**bits, outputs),
            Role(split, split=0 if self.by_chunk else 2, fill="embedding", fan_out=outputs),
        )
        self.add(
            "bias",
            (outputs,),
            Role(
                split,
                split=None if self.by_chunk else 0,
                fill=_small,
                decay=False,
                outside=self.by_chunk,
            ),
        )

    def forward(self, x_NC: Tensor) -> Tensor:
        z_NKt = at_least_float32(x_NC).unflatten(-1, (-1, self.bits))
        size = z_NKt.abs()
        score_NK = size.sum(-1) * torch.exp(-torch.log1p(torch.exp(-2 * size)).sum(-1))
        place_t = 2 ** torch.arange(self.bits - 1, -1, -1, device=x_NC.device)
        row_NK = ((z_NKt >= 0) * place_t).sum(-1)
        table_KRO = self.value("weight")
        first_K = torch.arange(row_NK.shape[-1], device=x_NC.device) * table_KRO.shape[1]
        flat_RO = table_KRO.flatten(0, 1)
        # One chunk at a time, so that the rows of all chunks never stand side by side.
        y_NO = torch.zeros((), dtype=flat_RO.dtype, device=x_NC.device)
        for chunk, start in enumerate(first_K.unbind()):
            rows_NO = nn.functional.embedding(row_NK[..., chunk] + start, flat_RO)
            y_NO = y_NO + score_NK[..., chunk, None] * rows_NO
        y_NO = y_NO.to(x_NC.dtype)
        if self.by_chunk:
            y_NO = self.ops.leave(y_NO)
        return y_NO + self.value("bias").to(y_NO.dtype)


@register(
    "feedforward",
    "memoryformer",
    paper="2411.12992",
    title="MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers",
)
class MemoryFormer(nn.Module):
    """Two memory layers with a layer norm between them and no activation (Ding et al. 2024).

    With K = D / bits chunks, the first layer gives K chunks of bits + 2 numbers and the second,
    of tables four times as long, gives D. A lookup is no matrix product, so by the convention of
    `model/accounting.py` it costs no operations; a token reads K rows per layer. Gradients reach
    the input through the scores alone. The paper also replaces attention's projections.

    Args:
        bits: t, the numbers of a chunk; tables have 2^t and 2^(t+2) rows.
    """

    probe = {"bits": 4}

    def __init__(self, dim: int, *, bits: Annotated[int, Field(gt=0, le=14)] = 8):
        super().__init__()
        if dim % bits:
            raise UserError(f"memoryformer: dim ({dim}) must be a multiple of bits ({bits})")
        self.chunks = dim // bits
        hidden = self.chunks * (bits + 2)
        self.up = MemoryLayer(self.chunks, bits, hidden, "column")
        self.norm = HiddenLayerNorm(hidden)
        self.down = MemoryLayer(self.chunks, bits + 2, dim, "row")

    def forward(self, x_BTD: Tensor, stream: Stream | None = None) -> Tensor:
        y_BTD: Tensor = self.down(self.norm(self.up(x_BTD)))
        return y_BTD

    def split_sizes(self) -> dict[str, int]:
        """What tensor parallelism must divide."""
        return {"chunks": self.chunks}
