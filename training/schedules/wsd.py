"""Warmup, stable, decay: a run can be prolonged from its stable part at no loss."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from core.registry import register
from training.schedules.base import Schedule


@register(
    "schedule",
    "wsd",
    paper="2404.06395",
    title="MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training",
    aliases=("trapezoid",),
)
class WarmupStableDecay(Schedule):
    """The peak for most of the run, then a decay (Hu et al. 2024, 2404.06395).

    The form `sqrt`, 1 − √x over the decay's progress x, is of Hägele et al. (2024, 2405.18392).

    Args:
        warmup: steps of linear warmup.
        decay: the part of the run's steps that decays, at its end.
        form: the decay's form.
        floor: the last learning rate, as a fraction of the peak.
    """

    def __init__(
        self,
        steps: int,
        *,
        warmup: Annotated[int, Field(ge=0)] = 0,
        decay: Annotated[float, Field(gt=0, le=1)] = 0.2,
        form: Literal["linear", "sqrt"] = "linear",
        floor: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ):
        super().__init__(steps, warmup, floor)
        # As a part of what follows the warmup, and never more than that.
        self.decay = min(1.0, decay * steps / self.rest)
        self.form = form

    def after(self, progress: float) -> float:
        x = max(0.0, (progress - (1.0 - self.decay)) / self.decay)
        return 1.0 - (x if self.form == "linear" else math.sqrt(x))
