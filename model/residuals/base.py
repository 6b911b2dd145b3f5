"""The residual protocol: what a branch reads from the stream and how its output joins it."""

from __future__ import annotations

from torch import Tensor, nn

from model.stream import Stream


class Residual(nn.Module):
    """One per branch. `read` and `write` may set fields of the stream they are given.

    `begin` and `finish` run once per stack, on the first and the last block's residual: a topology
    with several streams opens and joins them there.
    """

    defers: bool = False
    """Whether a sum stays pending in the stream after `write`."""

    def begin(self, stream: Stream) -> None:
        """Prepare the stream that enters the stack."""

    def read(self, stream: Stream) -> Tensor:
        """The BTD that the branch computes on."""
        raise NotImplementedError

    def write(self, stream: Stream, y_BTD: Tensor) -> None:
        """Add the branch's output."""
        raise NotImplementedError

    def finish(self, stream: Stream) -> None:
        """Leave one hidden state and nothing pending."""
        stream.settle()
