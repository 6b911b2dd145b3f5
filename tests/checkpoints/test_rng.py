"""The captured states reproduce every generator's stream."""

from __future__ import annotations

import random

import numpy as np
import torch

from checkpoints.rng import capture_rng, restore_rng


def draw() -> list[float]:
    # Normal draws come in pairs, so half of one is kept inside the generator's state.
    return [
        random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.normal()),
        float(torch.rand(())), float(torch.randn(())),
    ]  # fmt: skip


def test_streams_continue() -> None:
    for _ in range(2):  # once with and once without a stored half
        draw()
        states = {name: state.clone() for name, state in capture_rng().items()}
        expected = [draw() for _ in range(3)]
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        restore_rng(states)
        assert [draw() for _ in range(3)] == expected
