"""Held-out evaluation: exact at any number of ranks.

Axes: B batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from data_pipeline.dataset import Dataset
from data_pipeline.loader import in_order
from training.objectives.base import Objective

if TYPE_CHECKING:
    from parallel.engine import Engine


def validate(
    engine: Engine,
    objective: Objective,
    dataset: Dataset,
    *,
    micro_batch: int,
    limit: int | None = None,
) -> dict[str, float]:
    """Evaluate every held-out sample once, each on one rank; a collective.

    Args:
        engine: prepared, its model as it should be measured.
        micro_batch: samples of one rank in one forward pass.
        limit: read only so many samples, spread evenly; None: all.

    Returns:
        What the objective reports: `loss` in nats per target, `bits_per_byte`, `accuracy`.

    Raises:
        UserError: if there is no held-out sample.
    """
    length = len(dataset)
    if length == 0:
        raise UserError("the validation set is empty; raise data.validation.fraction")
    micro_batch = min(micro_batch, -(-length // engine.data_size))
    reader = in_order(dataset, micro_batch, engine.data_rank, engine.data_size, limit)
    stride = micro_batch * engine.data_size
    totals: dict[str, Tensor] = {}
    for turn, batch in enumerate(reader):
        # The position in the held-out order stands for the sample: alike at any number of ranks.
        first = turn * stride + engine.data_rank * micro_batch
        samples = torch.from_numpy(first + np.arange(micro_batch, dtype=np.int64))
        sums = engine.evaluate(objective.prepare(batch, samples), objective)
        for name, value in sums.items():
            if value.dim():  # an entry per expert or dimension: for pictures of training
                continue
            held = totals.get(name)
            totals[name] = value.double() if held is None else held + value.double()
    names = sorted(totals)
    summed = engine.total(torch.stack([totals[name] for name in names])).tolist()
    return objective.report(dict(zip(names, summed, strict=True)))
