"""A norm over channels that a column-split linear or the heads of attention produced.

Inside the region each rank holds its own share of the channels, so the statistics of a token are
summed over the ranks, in one message.

Axes: F channels, N any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.registry import resolve
from model.leaves import Axis, ChannelVector
from model.precision import at_least_float32


class SplitNorm(nn.Module):
    """x NF → NF: LayerNorm, or RMSNorm where it does not centre, of all ranks' channels.

    Statistics are computed in at least float32.
    """

    def __init__(self, channels: int, *, centre: bool, eps: float, gain: bool, bias: bool):
        super().__init__()
        self.centre, self.eps = centre, eps
        self.axis = Axis()
        self.gain = ChannelVector(channels) if gain else None
        self.bias = ChannelVector(channels, fill="zeros") if bias else None

    def forward(self, x_NF: Tensor) -> Tensor:
        wide_NF = at_least_float32(x_NF)
        y_NF = self._centred(wide_NF) if self.centre else self._scaled(wide_NF)
        if self.gain is not None:
            y_NF = y_NF * self.gain()
        if self.bias is not None:
            y_NF = y_NF + self.bias()
        return y_NF.to(x_NF.dtype)

    def _scaled(self, x_NF: Tensor) -> Tensor:
        total_N1 = self.axis.ops.split_sum(x_NF.square().sum(-1, keepdim=True))
        return x_NF * (total_N1 / self._channels(x_NF) + self.eps).rsqrt()

    def _centred(self, x_NF: Tensor) -> Tensor:
        # The squares around each rank's own mean, so that a large mean costs no digits:
        # Σ(x − m)² = Σ_r Σ(x − m_r)² + Σ_r s_r²/n_r − s²/n, for the ranks' sums s_r and counts n_r.
        own_N1 = x_NF.sum(-1, keepdim=True)
        around_N1 = (x_NF - own_N1 / x_NF.shape[-1]).square().sum(-1, keepdim=True)
        between_N1 = own_N1.square() / x_NF.shape[-1]
        sums_N3 = self.axis.ops.split_sum(torch.cat((own_N1, around_N1, between_N1), -1))
        sum_N1, around_N1, between_N1 = sums_N3.split(1, -1)
        channels = self._channels(x_NF)
        # Rounding may leave less than nothing between ranks of equal means.
        square_N1 = around_N1 + (between_N1 - sum_N1.square() / channels).clamp(min=0)
        y_NF: Tensor = (x_NF - sum_N1 / channels) * (square_N1 / channels + self.eps).rsqrt()
        return y_NF

    def _channels(self, x_NF: Tensor) -> int:
        return x_NF.shape[-1] * self.axis.ops.size


def split_norm(spec: Any, channels: int) -> nn.Module:
    """The norm that a config names, over channels that are split.

    Raises:
        UserError: for a norm that has no such form.
    """
    if isinstance(spec, nn.Module):
        return spec
    part: Any = resolve("norm", spec)
    if part.name == "layernorm":
        return SplitNorm(channels, centre=True, eps=part.eps, gain=True, bias=part.bias)
    if part.name == "rmsnorm":
        return SplitNorm(channels, centre=False, eps=part.eps, gain=part.gain, bias=part.bias)
    raise UserError(
        f"norm '{part.name}' has no form for channels that tensor parallelism splits; inside a "
        "branch use rmsnorm or layernorm"
    )
