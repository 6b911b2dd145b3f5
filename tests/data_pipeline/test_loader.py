from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.hashing import permute, stable_hash
from data_pipeline.dataset import Batch, BatchedDataset
from data_pipeline.loader import Loader, in_order
from data_pipeline.order import Indices


class Numbers(BatchedDataset):
    """Sample i is i, and remembers its draw."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Indices, draws: Indices) -> Batch:
        return {"tokens": torch.from_numpy(indices), "targets": torch.from_numpy(draws.copy())}


def read(loader: Loader, consumed: int) -> list[int]:
    return [int(v) for batch in loader.step(consumed) for v in batch["tokens"]]


sizes = st.sampled_from([1, 2, 4])


@given(st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 5000), sizes, sizes)
def test_ranks_together_read_exactly_the_global_batch(
    length: int, seed: int, consumed: int, size: int, micro: int
) -> None:
    together: list[int] = []
    for rank in range(size):
        together += read(Loader(Numbers(length), seed, 16, micro, rank, size), consumed)
    expected = [
        permute(g % length, length, stable_hash(seed, g // length))
        for g in range(consumed, consumed + 16)
    ]
    assert together == expected


def test_an_epoch_reads_every_sample_once() -> None:
    loader = Loader(Numbers(96), 3, 8, 4)
    first = [v for step in range(12) for v in read(loader, step * 8)]
    second = [v for step in range(12, 24) for v in read(loader, step * 8)]
    assert sorted(first) == sorted(second) == list(range(96))
    assert first != second


@pytest.mark.parametrize("prefetch", [False, True])
def test_resuming_anywhere_at_any_size_continues_the_sequence(prefetch: bool) -> None:
    unbroken = Loader(Numbers(50), 1, 8, 2)
    order = [v for step in range(20) for v in read(unbroken, step * 8)]
    for stop in (0, 1, 7, 19):
        for size in (1, 2, 4):
            loaders = [
                Loader(Numbers(50), 1, 8, 2, rank, size, prefetch=prefetch) for rank in range(size)
            ]
            resumed = [
                v for step in range(stop, 20) for loader in loaders for v in read(loader, step * 8)
            ]
            for loader in loaders:
                loader.close()
            assert resumed == order[stop * 8 :]


def test_prefetching_survives_a_jump() -> None:
    ahead, plain = Loader(Numbers(50), 1, 4, 2, prefetch=True), Loader(Numbers(50), 1, 4, 2)
    for consumed in (0, 4, 40, 0, 8):
        assert read(ahead, consumed) == read(plain, consumed)
    ahead.close()


def test_micro_batches_have_the_size_asked_for() -> None:
    batches = Loader(Numbers(50), 1, 12, 3, 1, 2).step(0)
    assert [len(batch["tokens"]) for batch in batches] == [3, 3]


def test_any_map_style_dataset_will_do() -> None:
    items: Any = [{"tokens": torch.tensor([i, i])} for i in range(6)]
    (batch,) = Loader(items, 0, 6, 6).step(0)
    assert batch["tokens"].shape == (6, 2)
    assert sorted(batch["tokens"][:, 0].tolist()) == list(range(6))


def test_an_indivisible_batch_names_the_nearest_that_works() -> None:
    with pytest.raises(UserError, match=r"30 is not a multiple of 8 .*nearest that works is 32"):
        Loader(Numbers(50), 0, 30, 4, 0, 2)


@given(st.integers(1, 60), st.integers(1, 5), sizes, st.none() | st.integers(1, 70))
def test_held_out_samples_are_counted_once(
    length: int, micro: int, size: int, limit: int | None
) -> None:
    counted: list[int] = []
    shapes = []
    for rank in range(size):
        batches = list(in_order(Numbers(length), micro, rank, size, limit))
        shapes.append([tuple(b["tokens"].shape) for b in batches])
        for batch in batches:
            counted += batch["tokens"][batch["targets"] != -100].tolist()
    assert len(counted) == len(set(counted)) == min(length, limit or length)
    assert all(s == shapes[0] for s in shapes) and set(shapes[0]) == {(micro,)}


def test_a_step_costs_little() -> None:
    import time

    loader = Loader(Numbers(10**9), 0, 1024, 1024)
    began = time.perf_counter()
    for step in range(20):
        loader.step(step * 1024)
    assert (time.perf_counter() - began) / 20 < 0.02
