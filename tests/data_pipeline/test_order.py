import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from core.hashing import permute
from data_pipeline.order import below, permute_many, random_words


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_is_the_permutation_of_core(size: int, seed: int) -> None:
    indices = np.arange(size)[:: max(1, size // 50)]
    assert permute_many(indices, size, seed).tolist() == [
        permute(int(i), size, seed) for i in indices
    ]


@given(st.integers(0, 2**60), st.integers(0, 2**64 - 1))
def test_agrees_for_sizes_beyond_any_memory(index: int, seed: int) -> None:
    size = 2**60 + 12345
    assert permute_many(np.array([index]), size, seed).tolist() == [permute(index, size, seed)]


def test_words_depend_on_each_draw_and_the_seed() -> None:
    draws = np.arange(1000)
    words = random_words(7, draws)
    assert len(set(words.tolist())) == 1000
    assert words[500] == random_words(7, np.array([500]))[0]
    assert not np.intersect1d(words, random_words(8, draws)).size


def test_below_is_even() -> None:
    counts = np.bincount(below(random_words(1, np.arange(70_000)), 7), minlength=7)
    assert counts.shape == (7,) and counts.min() > 9_600 and counts.max() < 10_400
