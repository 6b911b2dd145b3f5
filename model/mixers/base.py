"""The mixer protocol."""

from __future__ import annotations

from torch import Tensor, nn

from model.stream import Stream


class Mixer(nn.Module):
    """f(x_BTD, stream) → y_BTD inside the region: all tokens, this rank's heads or channels.

    A mixer ends in a `RowLinear`, or calls `leave`/`leave_alike` on what it returns. It may read
    the stream and set its `carried`, `losses` and `metrics`.
    """

    caches: bool = False
    """Whether it can decode one token at a time from `stream.cache`."""

    def forward(self, x_BTD: Tensor, stream: Stream) -> Tensor:
        raise NotImplementedError

    def math_flops(self, batch: int, tokens: int) -> int:
        """Forward operations that no leaf counts, such as the scores of attention."""
        return 0
