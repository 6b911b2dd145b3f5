"""Image classification.

Axes: B batch, C classes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from core.registry import register
from model.leaves import IGNORE
from model.output import Batch
from training.objectives.base import Objective, Sums, common


@register("objective", "image_classification")
class ImageClassification(Objective):
    """The cross-entropy of each image's class; accuracy is the part whose class scores highest.

    Args:
        label_smoothing: the part of the target spread evenly over all classes (Szegedy et al. 2016,
            1512.00567); in training only, so that held-out losses compare.
    """

    kind: ClassVar[Literal["language", "vision"]] = "vision"

    def __init__(self, *, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        targets_B = batch["targets"]
        output = model({key: value for key, value in batch.items() if key != "targets"})
        logits_BC = output.logits.float()
        sums = common(self, output, batch)
        sums["loss"] = F.cross_entropy(
            logits_BC,
            targets_B,
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.label_smoothing if torch.is_grad_enabled() else 0.0,
        )
        sums["correct"] = (logits_BC.detach().argmax(1) == targets_B).sum().float()
        return sums
