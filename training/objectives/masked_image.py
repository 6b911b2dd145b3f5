"""Masked image modelling.

Axes: B batch, P patches.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from core.hashing import stable_hash
from core.registry import register
from model.output import Batch
from training.objectives.base import Objective, Sums, common, counted
from training.objectives.draws import uniform


@register(
    "objective",
    "masked_image",
    paper="2111.09886",
    title="SimMIM: A Simple Framework for Masked Image Modeling",
)
class MaskedImage(Objective):
    """Patches hidden at random, their pixels predicted (Xie et al. 2022, 2111.09886).

    The same number of patches is hidden in every image. Which ones is a pure function of the seed
    and the sample's index; held-out masks are the same at every evaluation.

    Args:
        ratio: the part of the patches that is hidden.
    """

    kind: ClassVar[Literal["language", "vision"]] = "vision"

    def __init__(
        self, patches: int, seed: int = 0, *, ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    ):
        self.patches, self.seed = patches, stable_hash("masked_image", seed)
        self.hidden = min(patches, max(1, round(ratio * patches)))

    def prepare(self, batch: Batch, samples: Tensor) -> Batch:
        order_BP = torch.from_numpy(uniform(self.seed, samples, self.patches)).argsort(1)
        mask_BP = torch.zeros(order_BP.shape, dtype=torch.bool)
        return {**batch, "mask": mask_BP.scatter_(1, order_BP[:, : self.hidden], True)}

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        output = model(batch)
        losses_B = output.token_losses
        sums = common(self, output, batch)
        sums["loss"] = (losses_B * counted(batch["targets"])).sum()
        return sums
