"""A learned bias per head and bucket of relative distance (Raffel et al. 2019, 1910.10683).

Axes: B batch, T queries, S keys, H heads, N buckets.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from core.errors import UserError
from core.registry import register
from model.leaves import HeadParameter
from model.positions.base import Position


def bucket(offset: Tensor, buckets: int, furthest: int, causal: bool) -> Tensor:
    """The bucket of each key − query offset, int64.

    With causality all buckets lie behind the query, otherwise half of them on each side. The near
    half of a side's buckets hold one distance each; the rest grow geometrically up to `furthest`,
    and the last takes everything beyond.
    """
    side = torch.zeros_like(offset)
    if causal:
        distance = (-offset).clamp(min=0)
    else:
        buckets //= 2
        side = (offset > 0).long() * buckets
        distance = offset.abs()
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return side + torch.where(distance < exact, distance, far)


@register(
    "position",
    "relative_bias",
    paper="1910.10683",
    title="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    aliases=["t5_bias"],
)
class RelativeBias(Position):
    """A trained number per head and distance bucket is added to the scores.

    Each layer has its own table.

    Args:
        buckets: how many buckets; half of them on each side without causality.
        furthest: the distance from which all share the last bucket.
    """

    place = "attention"
    biases = True

    def __init__(
        self,
        heads: int,
        causal: bool = False,
        *,
        buckets: Annotated[int, Field(ge=4, multiple_of=4)] = 32,
        furthest: Annotated[int, Field(gt=1)] = 128,
    ):
        super().__init__()
        if furthest <= buckets // 2:
            raise UserError(
                f"relative_bias: furthest ({furthest}) must be above half the buckets ({buckets})"
            )
        self.buckets, self.furthest, self.causal = buckets, furthest, causal
        self.table = HeadParameter(heads, buckets, fill="embedding")

    def per_head(self) -> Tensor:
        table_HN: Tensor = self.table()
        return table_HN

    def form(self, per_head: Tensor, queries_BT: Tensor, keys_BS: Tensor) -> Tensor:
        offset_BTS = keys_BS[:, None, :] - queries_BT[:, :, None]
        bucket_BTS = bucket(offset_BTS, self.buckets, self.furthest, self.causal)
        return F.embedding(bucket_BTS, per_head.t()).permute(0, 3, 1, 2)
