"""The order of samples, for many indexes at once.

`permute_many` gives exactly what `core.hashing.permute` gives, index by index; `random_words` is
the source of everything random about a sample. Both are pure functions of integers, so neither
the number of ranks nor a restart can change them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_TURNS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_TURN = 0xD1B54A32D192ED03
_MASK_64 = 2**64 - 1


def permute_many(indices: Indices, size: int, seed: int) -> Indices:
    """Where each of `indices` lands under the permutation of range(size) named by `seed`.

    Raises:
        IndexError: if an index is outside range(size).
    """
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise IndexError(f"an index is outside a permutation of {size}")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = indices.astype(np.uint64)
    walking = np.ones(values.shape, dtype=bool)
    while walking.any():
        left, right = values[walking] >> half, values[walking] & mask
        for turn in range(_TURNS):
            key = np.uint64((seed * _GOLDEN + (turn + 1) * _TURN) & _MASK_64)
            left, right = right, left ^ (_finalise(right + key) & mask)
        values[walking] = (left << half) | right
        walking &= values >= np.uint64(size)
    return values.astype(np.int64)


def random_words(seed: int, draws: Indices) -> Words:
    """A 64-bit random word for each draw: SplitMix64 started at `seed`, read at `draws`."""
    states = draws.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed & _MASK_64)
    return _finalise(_finalise(states))


def below(words: Words, bound: int) -> Indices:
    """The words scaled to range(bound); unbiased to 2**-32 for bounds below 2**32."""
    if bound > 2**32:
        return (words % np.uint64(bound)).astype(np.int64)
    return (((words >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def _finalise(words: Words) -> Words:
    """SplitMix64's finaliser."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
