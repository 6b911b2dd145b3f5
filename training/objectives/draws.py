"""Random numbers that are pure functions of (seed, sample, place): no state, no order, no ranks.

Axes: B samples, N numbers of each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

Uniform = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]


def uniform(seed: int, samples_B: Tensor, count: int) -> Uniform:
    """`count` numbers in [0, 1) for each sample index; shape B,N.

    Args:
        seed: 64 bits; give independent draws for one sample independent seeds.
    """
    samples = samples_B.numpy().astype(np.uint64)
    with np.errstate(over="ignore"):
        start_B1 = _mix(_mix(samples + np.uint64(seed)) ^ np.uint64(seed))[:, None]
        words_BN = _mix(start_B1 + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (words_BN >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(word: Words) -> Words:
    """SplitMix64's finaliser."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
