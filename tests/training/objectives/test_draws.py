"""The stateless uniform numbers."""

import numpy as np
import torch

from training.objectives.draws import uniform


def test_uniform_and_independent():
    draws = uniform(7, torch.arange(2000), 50)
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert abs(counts / counts.mean() - 1).max() < 0.06
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.08
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.08
    assert len(np.unique(draws)) == draws.size


def test_pure_function_of_seed_and_sample():
    some = uniform(7, torch.tensor([5, 1]), 4)
    assert np.array_equal(some, uniform(7, torch.arange(6), 4)[[5, 1]])
    assert not np.array_equal(some, uniform(8, torch.tensor([5, 1]), 4))


def test_the_numbers_never_change():
    # Masks of a resumed run must be those of the run that began, in every version.
    assert uniform(1, torch.tensor([2]), 2)[0].tolist() == [0.35948975938264327, 0.6605497907432824]
