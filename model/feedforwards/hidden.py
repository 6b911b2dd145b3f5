"""A layer norm over hidden channels, which may be split over ranks. Axes: N any, F channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.leaves import Axis, ChannelVector
from model.precision import at_least_float32


class HiddenLayerNorm(nn.Module):
    """(h − mean) / sqrt(variance + eps) · gain + bias over all F channels, inside the region.

    The statistics are taken in at least float32.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.channels, self.eps = channels, eps
        self.axis = Axis()
        self.gain = ChannelVector(channels)
        self.bias = ChannelVector(channels, fill="zeros")

    def forward(self, h_NF: Tensor) -> Tensor:
        ops = self.axis.ops
        h = at_least_float32(h_NF)
        h = h - ops.split_sum(h.sum(-1, keepdim=True)) / self.channels
        variance_N1 = ops.split_sum(h.square().sum(-1, keepdim=True)) / self.channels
        normed_NF = h * torch.rsqrt(variance_N1 + self.eps)
        y_NF: Tensor = normed_NF * self.gain() + self.bias()
        return y_NF.to(h_NF.dtype)
