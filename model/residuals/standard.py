"""The standard residual: x + f(x) (He et al. 2015, 1512.03385)."""

from __future__ import annotations

from torch import Tensor

from core.registry import register
from model.residuals.base import Residual
from model.stream import Stream


@register(
    "residual",
    "standard",
    paper="1512.03385",
    title="Deep Residual Learning for Image Recognition",
)
class StandardResidual(Residual):
    """Each branch reads the whole stream and adds to it."""

    def __init__(self) -> None:
        super().__init__()

    def read(self, stream: Stream) -> Tensor:
        stream.settle()
        return stream.hidden

    def write(self, stream: Stream, y_BTD: Tensor) -> None:
        stream.hidden = stream.hidden + y_BTD
