"""Stretches of tensors as boxes, and their way through a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.store import CheckpointStore
from parallel.fragment import Fragment, boxes

shapes = st.lists(st.integers(1, 4), max_size=4)


@given(shapes, st.data())
def test_boxes_hold_the_stretch_in_order(shape: list[int], data: Any) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    held = []
    found = list(boxes(start, stop, shape))
    for offsets, sizes in found:
        box = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        assert tuple(box.shape) == sizes
        held += box.flatten().tolist()
    assert held == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_fragment_shares_memory_and_has_no_arithmetic() -> None:
    flat = torch.zeros(4)
    fragment = Fragment.of(flat, 1, shape=(2, 6), part=(2, 3), at=(0, 3))
    assert fragment.shape == (2, 6) and fragment.dtype == torch.float32
    assert [place for place, _ in fragment.parts] == [(0, 4), (1, 3)]
    fragment.parts[1][1].fill_(1)
    assert flat.tolist() == [0, 0, 1, 1]
    with pytest.raises(TypeError, match="only says which boxes"):
        fragment.clone()


def test_a_whole_tensor_is_read_into_fragments(tmp_path: Path) -> None:
    whole = torch.arange(42.0).view(3, 14)
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"w": whole}})
    flat = torch.zeros(10)
    # The second half of the columns, and of it the elements 5 … 14.
    fragment = Fragment.of(flat, 5, shape=(3, 14), part=(3, 7), at=(0, 7))
    store.load({"model": {"w": fragment}})
    assert torch.equal(flat, whole[:, 7:].flatten()[5:15])


def test_fragments_that_make_up_a_tensor_are_read_as_a_whole(tmp_path: Path) -> None:
    values = torch.arange(24.0)
    shape = (2, 3, 4)
    ends = [Fragment.of(values[a:b], a, shape, shape, (0, 0, 0)) for a, b in ((0, 7), (7, 24))]
    cut = Fragment(shape, [part for end in ends for part in end.parts], values.dtype)
    assert len(cut.parts) > 1
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"w": cut}})
    whole = torch.zeros(shape)
    store.load({"model": {"w": whole}})
    assert torch.equal(whole, values.view(shape))
