import numpy as np
import pytest
import torch

from data_pipeline.dataset import Batch, BatchedDataset, Concatenation, Mixture
from data_pipeline.loader import Loader
from data_pipeline.order import Indices


class Tagged(BatchedDataset):
    def __init__(self, tag: int, length: int):
        self.tag, self.length = tag, length

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Indices, draws: Indices) -> Batch:
        assert ((indices >= 0) & (indices < self.length)).all()
        return {
            "tag": torch.full((len(indices),), self.tag),
            "item": torch.from_numpy(indices.copy()),
            "draw": torch.from_numpy(draws.copy()),
        }


@pytest.mark.parametrize(
    ("lengths", "weights"),
    [((10, 10), (1, 1)), ((1000, 7), (1, 3)), ((3, 5, 400), (0.2, 0.5, 0.3)), ((1, 10**6), (9, 1))],
)
def test_an_epoch_has_the_proportions_and_every_sample(
    lengths: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    mixture = Mixture([Tagged(i, n) for i, n in enumerate(lengths)], weights)
    chosen = np.arange(len(mixture))
    which, local = mixture.place(chosen)
    for number, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        share = weight / sum(weights)
        assert abs((which == number).sum() - share * len(mixture)) <= 2
        uses = np.bincount(local[which == number], minlength=length)
        assert len(uses) == length and uses.min() >= 1 and uses.max() - uses.min() <= 1


def test_a_run_has_the_proportions() -> None:
    mixture = Mixture([Tagged(0, 50), Tagged(1, 9000)], [3, 1])
    loader = Loader(mixture, 0, 2000, 2000)
    tags = torch.cat([loader.step(c)[0]["tag"] for c in range(0, 8000, 2000)])
    assert (tags == 0).float().mean().item() == pytest.approx(0.75, abs=0.015)


def test_rows_come_in_the_order_asked_for() -> None:
    mixture = Mixture([Tagged(0, 4), Tagged(1, 4)], [1, 1])
    asked = np.array([7, 0, 5, 2])
    batch = mixture.batch(asked, asked + 100)
    assert batch["tag"].tolist() == [1, 0, 1, 0]
    assert batch["item"].tolist() == [3, 0, 1, 2]
    assert batch["draw"].tolist() == [107, 100, 105, 102]
    assert mixture[7] == {"tag": 1, "item": 3, "draw": 7}


def test_concatenation_reads_each_in_turn() -> None:
    both = Concatenation([Tagged(0, 2), Tagged(1, 3)])
    assert [(int(s["tag"]), int(s["item"])) for s in (both[i] for i in range(len(both)))] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


def test_an_index_outside_is_an_error() -> None:
    with pytest.raises(IndexError, match="sample 5 of 5"):
        Tagged(0, 5)[5]
