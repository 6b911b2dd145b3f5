"""A straight line from the peak to the floor."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core.registry import register
from training.schedules.base import Schedule


@register("schedule", "linear")
class Linear(Schedule):
    """A straight line from the peak to the floor.

    Args:
        warmup: steps of linear warmup.
        floor: the last learning rate, as a fraction of the peak.
    """

    def __init__(
        self,
        steps: int,
        *,
        warmup: Annotated[int, Field(ge=0)] = 0,
        floor: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ):
        super().__init__(steps, warmup, floor)

    def after(self, progress: float) -> float:
        return 1.0 - progress
