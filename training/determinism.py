"""The same bits twice: seeds, and algorithms that keep their order of summation."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from core.hashing import stable_hash


def seed_hosts(seed: int, data_rank: int) -> None:
    """Seed Python's and NumPy's generators; torch's are the engine's, which knows the layout."""
    number = stable_hash("run", seed, data_rank)
    random.seed(number)
    np.random.seed(number % 2**32)


def use_deterministic(on: bool) -> None:
    """Ask torch for algorithms that repeat bit by bit, or allow any.

    Uninitialised memory is not filled: nothing of ours reads it, and filling costs time.
    """
    if on:
        # cuBLAS reads it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not on
