"""What a dataset is to the loader, and mixtures of datasets.

A dataset is map-style: `len(set)` items, and `set[i]` is a dict of tensors that depends on `i`
alone. One that can make a whole batch faster than item by item also has `batch(indices, draws)`.
`draws` are the global sample indexes; they key whatever is random about a sample (the crop of an
image, the start of a random window), so that it differs from epoch to epoch and still is a pure
function of the position. `set[i]` is the sample of index `i` and draw `i`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from data_pipeline.order import Indices

Batch = dict[str, torch.Tensor]


class Dataset(Protocol):
    """Map-style: a length and items that are pure functions of their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class BatchedDataset(ABC):
    """A dataset made by writing `batch`, which returns tensors with a leading axis of samples."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Indices, draws: Indices) -> Batch:
        """The samples of `indices`, stacked."""

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):  # IndexError is also what ends `for sample in set`
            raise IndexError(f"sample {index} of {len(self)}")
        one = np.array([index], dtype=np.int64)
        return {key: value[0] for key, value in self.batch(one, one).items()}


def fetch(dataset: Dataset, indices: Indices, draws: Indices) -> Batch:
    """A batch from any dataset, whole where it can be and item by item where it cannot."""
    if isinstance(dataset, BatchedDataset):
        return dataset.batch(indices, draws)
    items = [dataset[int(index)] for index in indices]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class Concatenation(BatchedDataset):
    """Several datasets, one after another: held-out data of several sources."""

    def __init__(self, sets: Sequence[BatchedDataset]):
        self.sets = list(sets)
        self.ends = np.cumsum([len(s) for s in self.sets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, indices: Indices, draws: Indices) -> Batch:
        which = np.searchsorted(self.ends, indices, side="right")
        local = indices - np.concatenate([[0], self.ends])[which]
        return _gather(self.sets, which, local, draws)


class Mixture(BatchedDataset):
    """Several datasets in proportion to their weights.

    An epoch is the shortest in which every sample of every set occurs at least once in the given
    proportions: N = max over sets of (length / share), and set s holds a run of round(share·N)
    indexes, walking through its samples as often as it takes. Within the epoch the proportions
    are exact to one sample; the loader's permutation spreads them evenly over a run.
    """

    def __init__(self, sets: Sequence[BatchedDataset], weights: Sequence[float]):
        assert len(sets) == len(weights) > 0 and all(w > 0 for w in weights)
        self.sets = list(sets)
        self.shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        epoch = max(len(s) / share for s, share in zip(self.sets, self.shares, strict=True))
        ends = np.rint(np.cumsum(self.shares) * epoch).astype(np.int64)
        # Rounding may leave a set one index short of its own length, or a tiny set with none.
        needed = np.array(
            [
                1 if len(s) < epoch * share else len(s)
                for s, share in zip(self.sets, self.shares, strict=True)
            ]
        )
        counts = np.maximum(np.diff(ends, prepend=0), needed)
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, indices: Indices) -> tuple[Indices, Indices]:
        """Which set each index reads, and which sample of it."""
        which = np.searchsorted(self.ends, indices, side="right")
        local = indices - np.concatenate([[0], self.ends])[which]
        return which, local % np.array([len(s) for s in self.sets])[which]

    def batch(self, indices: Indices, draws: Indices) -> Batch:
        which, local = self.place(indices)
        return _gather(self.sets, which, local, draws)


def _gather(
    sets: Sequence[BatchedDataset], which: Indices, local: Indices, draws: Indices
) -> Batch:
    """One batch out of several sets, in the order asked for."""
    first = int(which[0])
    if (which == first).all():
        return sets[first].batch(local, draws)
    out: Batch = {}
    for number in np.unique(which):
        rows = np.flatnonzero(which == number)
        part = sets[int(number)].batch(local[rows], draws[rows])
        for key, value in part.items():
            if key not in out:
                out[key] = value.new_empty((len(which), *value.shape[1:]))
            out[key][torch.from_numpy(rows)] = value
    return out
