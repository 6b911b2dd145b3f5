"""What an objective is, and the sums it returns.

Axes: B batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from model.leaves import IGNORE
from model.output import Batch, ModelOutput

Sums = dict[str, Tensor]
METRIC = "metric/"
"""Before the name of a model's own metric among the sums."""


class Objective:
    """Turns a model and a batch into sums over this batch's samples.

    `loss` (nats) over `count`, plus `auxiliary` over `samples`, is what is differentiated; the
    divisions are by the sums over the whole global batch. Other sums are for reporting.
    """

    kind: ClassVar[Literal["language", "vision"]]

    def prepare(self, batch: Batch, samples: Tensor) -> Batch:
        """What this objective adds to a batch, on the host, before it goes to the device.

        Args:
            batch: as the data gave it, with leading axis B.
            samples: each sample's index in the run (or in the held-out set), B int64; whatever is
                random depends on it and the seed alone.
        """
        return batch

    def counts(self, batch: Batch) -> Sums:
        """`count` and `samples` of a prepared batch, without running the model."""
        targets = batch["targets"]
        return {
            "count": (targets != IGNORE).sum().float(),
            "samples": counted(targets).sum().float(),
        }

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        """The sums of one micro-batch, float32; `loss` and `auxiliary` with gradient.

        Scalars, but for metrics of the model that are vectors.
        """
        raise NotImplementedError

    def report(self, totals: dict[str, float]) -> dict[str, float]:
        """What is reported of scalar sums over any number of batches."""
        count = max(totals["count"], 1.0)
        report = {"loss": totals["loss"] / count}
        samples = max(totals.get("samples", 1.0), 1.0)
        if "auxiliary" in totals:
            report["auxiliary_loss"] = totals["auxiliary"] / samples
        if "correct" in totals:
            report["accuracy"] = totals["correct"] / count
        for name, value in totals.items():
            if name.startswith(METRIC):
                report[name.removeprefix(METRIC)] = value / samples
        return report

    def report_vectors(
        self, totals: dict[str, float], vectors: dict[str, list[float]]
    ) -> dict[str, list[float]]:
        """The model's metrics with an entry per expert, dimension or layer, from their sums."""
        samples = max(totals.get("samples", 1.0), 1.0)
        return {
            name.removeprefix(METRIC): [value / samples for value in values]
            for name, values in vectors.items()
        }


def common(objective: Objective, output: ModelOutput, batch: Batch) -> Sums:
    """The sums that every objective has: counts, auxiliary losses, the model's metrics.

    A metric of several elements is a vector among the sums. Each counts by the batch's samples;
    what fills up a short batch counts for nothing.
    """
    sums = objective.counts(batch)
    samples = sums["samples"]
    if output.losses:
        weight_B = counted(batch["targets"]).float()
        sums["auxiliary"] = torch.stack(
            [(loss_B.float() * weight_B).sum() for loss_B in output.losses.values()]
        ).sum()
    for name, value in output.metrics.items():
        shape = () if value.numel() == 1 else (-1,)
        sums[METRIC + name] = value.detach().float().reshape(shape) * samples
    return sums


def counted(targets: Tensor) -> Tensor:
    """Which samples B have any target that counts."""
    kept = targets != IGNORE
    return kept.flatten(1).any(1) if kept.dim() > 1 else kept
