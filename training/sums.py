"""A step's sums on their way to the host: one tensor there, numbers and lists here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def pack(sums: Mapping[str, Tensor]) -> Tensor:
    """All values behind one another in order of name, float64; scalars and vectors."""
    return torch.cat([sums[name].detach().double().reshape(-1) for name in sorted(sums)])


def unpack(
    sums: Mapping[str, Tensor], values: Iterator[float]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Take from `values` what `pack(sums)` put there: the scalars by name, and the vectors."""
    scalars: dict[str, float] = {}
    vectors: dict[str, list[float]] = {}
    for name in sorted(sums):
        if sums[name].dim() == 0:
            scalars[name] = next(values)
        else:
            vectors[name] = [next(values) for _ in range(sums[name].numel())]
    return scalars, vectors
