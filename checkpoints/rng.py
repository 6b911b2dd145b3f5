"""The states of the random number generators of this process, as tensors.

Tensors, so that a checkpoint holds them like everything else and nothing is ever unpickled.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch


def capture_rng() -> dict[str, torch.Tensor]:
    """The states of Python's, NumPy's and torch's generators; of the current CUDA device too."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert version == 3 and kind == "MT19937"
    states = {
        "torch": torch.get_rng_state(),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: dict[str, torch.Tensor]) -> None:
    """Set the generators to what `capture_rng` returned."""
    torch.set_rng_state(states["torch"])
    gauss = float(states["python.gauss"])
    words = tuple(states["python.words"].tolist())
    random.setstate((3, words, None if math.isnan(gauss) else gauss))
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(states["numpy.gauss"])))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
