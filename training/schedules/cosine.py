"""Half a cosine from the peak to the floor."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from core.registry import register
from training.schedules.base import Schedule


@register(
    "schedule",
    "cosine",
    paper="1608.03983",
    title="SGDR: Stochastic Gradient Descent with Warm Restarts",
)
class Cosine(Schedule):
    """Half a cosine from the peak to the floor (Loshchilov and Hutter 2017, 1608.03983).

    Args:
        warmup: steps of linear warmup.
        floor: the last learning rate, as a fraction of the peak.
    """

    def __init__(
        self,
        steps: int,
        *,
        warmup: Annotated[int, Field(ge=0)] = 0,
        floor: Annotated[float, Field(ge=0, le=1)] = 0.1,
    ):
        super().__init__(steps, warmup, floor)

    def after(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
