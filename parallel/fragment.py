"""A rank's part of a tensor that is cut anywhere, as ZeRO cuts it.

ZeRO lays parameters end to end and gives each rank an equal stretch of the whole, so a rank may
hold the end of one row, some full rows and the beginning of another. Such a stretch is a few boxes,
and boxes are what checkpoints write and read: nothing is gathered, and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

Place = tuple[int, ...]
"""One number for every axis: where a box begins, or how large it is."""


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[Place, Place]]:
    """Elements `start`…`stop` of a row-major tensor as boxes, in order: where and how large.

    >>> list(boxes(2, 7, (3, 3)))
    [((0, 2), (1, 1)), ((1, 0), (1, 3)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if len(shape) else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are whole
    if first > last:  # within one row
        yield from _within(last, start - last * row, stop - last * row, shape)
        return
    if start < first * row:
        yield from _within(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from _within(last, 0, stop - last * row, shape)


def _within(row: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[Place, Place]]:
    for offsets, sizes in boxes(start, stop, shape[1:]):
        yield (row, *offsets), (1, *sizes)


class Fragment(torch.Tensor):
    """Boxes of a tensor of a known shape; it has a shape and a type, but no arithmetic.

    `parts`: where each box begins in the whole tensor, and its values. Boxes of one fragment do not
    overlap; on several ranks they overlap only where the ranks hold the same values.
    """

    parts: list[tuple[Place, Tensor]]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], parts: list[tuple[Place, Tensor]], dtype: torch.dtype
    ) -> Fragment:
        made: Fragment = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        made.parts = parts
        return made

    @classmethod
    def of(
        cls, flat: Tensor, start: int, shape: Sequence[int], part: Sequence[int], at: Sequence[int]
    ) -> Fragment:
        """A stretch of a box of a tensor.

        Args:
            flat: the values, one axis; they are shared, not copied.
            start: which element of the box, counted row by row, comes first in `flat`.
            shape: of the whole tensor.
            part: the shape of the box, this rank's part over the tensor and expert axes.
            at: where the box begins in the whole tensor.
        """
        parts, done = [], 0
        for offsets, sizes in boxes(start, start + flat.numel(), part):
            values = flat.narrow(0, done, math.prod(sizes)).view(sizes)
            place = tuple(base + offset for base, offset in zip(at, offsets, strict=True))
            parts.append((place, values))
            done += values.numel()
        return cls(shape, parts, flat.dtype)

    def flat(self) -> Tensor:
        """The stretch that a fragment was made `of`: its boxes, one behind another."""
        flats = [values.reshape(-1) for _, values in self.parts]
        return torch.cat(flats) if flats else torch.empty(0, dtype=self.dtype)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What torch.distributed.checkpoint is to read into this tensor."""
        return [
            ChunkStorageMetadata(offsets=torch.Size(place), sizes=values.shape)
            for place, values in self.parts
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The values of the box that begins at `index.offset`."""
        return next(values for place, values in self.parts if torch.Size(place) == index.offset)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        places = ", ".join(f"{place}+{tuple(values.shape)}" for place, values in self.parts)
        return f"Fragment({tuple(self.shape)}: {places})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{func}: a fragment only says which boxes of a tensor are here")
