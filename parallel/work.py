"""Parts of a model's work done inside its `forward`, for engines that cut it into parts.

What wraps a model acts around `forward`: FSDP2 gathers the outermost parameters there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Work:
    """Something to do, in place of a batch."""

    def __init__(self, run: Callable[[], Any]):
        self.run = run


def takes_work(model: nn.Module, forward: Callable[..., Any]) -> None:
    """Have `model(Work(f))` give f(); other calls go to `forward`."""

    def dispatch(batch: Any, *rest: Any) -> Any:
        return batch.run() if isinstance(batch, Work) else forward(batch, *rest)

    model.forward = dispatch
