"""The peak, after the warmup."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core.registry import register
from training.schedules.base import Schedule


@register("schedule", "constant")
class Constant(Schedule):
    """The peak learning rate after the warmup.

    Args:
        warmup: steps of linear warmup.
    """

    def __init__(self, steps: int, *, warmup: Annotated[int, Field(ge=0)] = 0):
        super().__init__(steps, warmup, floor=0.0)

    def after(self, progress: float) -> float:
        return 1.0
