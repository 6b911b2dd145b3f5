"""From a loss function's sums to what is differentiated: Σloss/Σcount + Σauxiliary/Σsamples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.output import Batch
from parallel.engine import LossFunction, Sums


def add(held: Sums, sums: Sums) -> None:
    """Add a micro-batch's sums to those of the step, detached."""
    for name, value in sums.items():
        held[name] = held[name] + value.detach() if name in held else value.detach()


def known_before(
    batches: list[Batch], loss: LossFunction, total: Callable[[Tensor], Tensor]
) -> Sums | None:
    """The step's divisors, if the loss can tell them from the batches alone."""
    if not hasattr(loss, "counts"):
        return None
    parts = [loss.counts(batch) for batch in batches]
    return divisors({k: torch.stack([part[k] for part in parts]).sum() for k in parts[0]}, total)


def divisors(sums: Sums, total: Callable[[Tensor], Tensor]) -> Sums:
    """The divisors over the whole global batch, at least 1.

    Args:
        total: sums over the data ranks.
    """
    keys = [key for key in ("count", "samples") if key in sums]
    values = torch.stack([sums[key].detach().double().reshape(()) for key in keys])
    return dict(zip(keys, total(values).clamp(min=1.0).float(), strict=True))


def root(sums: Sums, known: Sums | None) -> Tensor:
    """What is differentiated of a micro-batch; undivided while the divisors are not known.

    Raises:
        TypeError: if they are not, and there are two of them.
    """
    value = sums["loss"].float()
    if known is not None:
        value = value / known["count"]
    auxiliary = sums.get("auxiliary")
    if auxiliary is not None and auxiliary.requires_grad:
        if known is None:
            raise TypeError(
                "auxiliary losses with several micro-batches or a pipeline: the loss function "
                "needs counts(batch), so that count and samples are known before the backward pass"
            )
        value = value + auxiliary.float() / known["samples"]
    return value
