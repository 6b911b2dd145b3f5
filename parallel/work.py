"""Parts of a model's work done inside its `forward`, for engines that cut it into parts.

What wraps a model acts around `forward`: FSDP2 gathers the outermost parameters there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from model.output import Batch, ModelOutput
from model.stream import Stream
from parallel.engine import Sums

Ending = Callable[[nn.Module, Batch], tuple[Tensor, Sums]]
"""The end of a micro-batch: model and batch → what is differentiated, and the sums."""


class Work:
    """Something to do, in place of a batch."""

    def __init__(self, run: Callable[[], Any]):
        self.run = run


def takes_work(model: nn.Module, forward: Callable[..., Any]) -> None:
    """Have `model(Work(f))` give f(); other calls go to `forward`."""

    def dispatch(batch: Any, *rest: Any) -> Any:
        return batch.run() if isinstance(batch, Work) else forward(batch, *rest)

    model.forward = dispatch


class Arrived(nn.Module):
    """The model as a loss sees it on the last stage: a stream has come, and the end is left."""

    def __init__(self, end: Callable[[Stream, Batch], ModelOutput], stream: Stream, training: bool):
        super().__init__()
        self.training = training
        self._end, self._stream = end, stream

    def forward(self, batch: Batch) -> ModelOutput:
        return self._end(self._stream, batch)
