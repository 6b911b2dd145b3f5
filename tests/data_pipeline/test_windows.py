from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from data_pipeline.tokens import Tokens
from data_pipeline.windows import RandomWindows, Windows

END = 99


def stream(lengths: list[int]) -> Tokens:
    """Documents of distinct ids, each closed by END."""
    parts, at = [], 0
    for length in lengths:
        parts += [*range(1000 + at, 1000 + at + length), END]
        at += length
    starts = np.cumsum([0, *(n + 1 for n in lengths[:-1])])
    return Tokens(np.array(parts, dtype=np.uint16), starts, at)


documents = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(documents, st.integers(1, 12))
def test_masked_windows_against_a_loop(lengths: list[int], sequence: int) -> None:
    tokens = stream(lengths)
    ids = tokens.ids.tolist()
    owner = [d for d, n in enumerate(lengths) for _ in range(n + 1)]
    windows = Windows(tokens, sequence, masked=True, end=END, partial=True)
    for index in range(len(windows)):
        sample = windows[index]
        first = index * sequence
        position = 0
        for t in range(sequence):
            at = first + t
            if at >= len(ids):
                assert sample["tokens"][t] == END and sample["targets"][t] == -100
                assert sample["documents"][t] > sample["documents"][len(ids) - 1 - first]
                continue
            position = position + 1 if t and owner[at] == owner[at - 1] else 0
            inside = at + 1 < len(ids) and owner[at + 1] == owner[at]
            assert sample["tokens"][t] == ids[at]
            assert sample["targets"][t] == (ids[at + 1] if inside else -100)
            assert sample["documents"][t] == owner[at] - owner[first]
            assert sample["positions"][t] == position


@given(documents, st.integers(1, 12))
def test_held_out_windows_ask_for_every_token_once(lengths: list[int], sequence: int) -> None:
    tokens = stream(lengths)
    windows = Windows(tokens, sequence, masked=False, end=END, partial=True)
    asked = torch.cat([windows[i]["targets"] for i in range(len(windows))])
    assert asked[asked != -100].tolist() == tokens.ids.tolist()[1:]
    assert set(windows[0]) == {"tokens", "targets"}


def test_training_windows_drop_the_rest() -> None:
    windows = Windows(stream([20]), 8, masked=False, end=END)
    assert len(windows) == 2
    assert windows[1]["targets"].tolist() == list(range(1009, 1017))


def test_random_windows_are_pure_and_cover_the_text() -> None:
    tokens = stream([500])
    windows = RandomWindows(tokens, 10, masked=False, end=END, seed=5)
    assert len(windows) == 50
    again = RandomWindows(tokens, 10, masked=False, end=END, seed=5)
    draws = np.arange(20_000)
    starts = windows.starts(draws % 50, draws)
    assert (starts == again.starts(draws % 50, draws)).all()
    assert set(starts.tolist()) == set(range(len(tokens.ids) - 10))
    other = RandomWindows(tokens, 10, masked=False, end=END, seed=6)
    assert (starts != other.starts(draws % 50, draws)).mean() > 0.9
    # The same sample in the next epoch starts elsewhere.
    indices = np.arange(50)
    assert (windows.starts(indices, indices) != windows.starts(indices, indices + 50)).any()


def test_a_sequence_longer_than_the_text_says_what_fits() -> None:
    with pytest.raises(UserError, match=r"data.sequence is 30, but the text has 21 tokens.* 20"):
        Windows(stream([20]), 30, masked=True, end=END)


def test_windows_read_a_mapped_file(tmp_path: Path) -> None:
    tokens = stream([50])
    (tmp_path / "x").write_bytes(tokens.ids.tobytes())
    mapped = Tokens(np.memmap(tmp_path / "x", dtype=np.uint16, mode="r"), tokens.starts, 50)
    a, b = (Windows(t, 7, masked=True, end=END)[2] for t in (tokens, mapped))
    assert all(torch.equal(a[key], b[key]) for key in a)
