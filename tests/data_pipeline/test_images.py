from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.augment import Shift
from data_pipeline.images import Decoded, Decoding, Images, fit, measure, open_store
from data_pipeline.sources.folder import ImageFolder

PIXELS = np.random.default_rng(1).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
STORE = Decoded(PIXELS, np.arange(40) % 4)


def test_images_are_normalised() -> None:
    mean, std = measure([(STORE, np.arange(40))])
    images = Images(STORE, np.arange(40), mean, std)
    whole = torch.stack([images[i]["images"] for i in range(40)])
    assert whole.shape == (40, 3, 6, 6) and whole.dtype == torch.float32
    assert whole.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert whole.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    expected = (PIXELS[5] / 255 - mean) / std
    assert np.allclose(images[5]["images"].numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_a_flat_channel_is_not_divided_by_nothing() -> None:
    flat = Decoded(np.full((3, 2, 2, 1), 51, np.uint8), np.zeros(3, np.int64))
    mean, std = measure([(flat, np.arange(3))])
    assert mean == pytest.approx([0.2]) and std == [1.0]


def test_changes_are_pure_and_differ_between_epochs() -> None:
    images, again, other = (
        Images(STORE, np.arange(40), [0.0] * 3, [1.0] * 3, [Shift(pixels=2)], seed)
        for seed in (3, 3, 4)
    )
    indices = np.arange(40)
    first = images.batch(indices, indices)["images"]
    assert torch.equal(first, again.batch(indices, indices)["images"])
    assert torch.equal(first[7], images[7]["images"])
    assert not torch.equal(first, images.batch(indices, indices + 40)["images"])
    assert not torch.equal(first, other.batch(indices, indices)["images"])


def test_a_set_reads_its_own_images() -> None:
    images = Images(STORE, np.array([3, 9, 30]), [0.0] * 3, [1.0] * 3)
    assert len(images) == 3
    assert [int(images[i]["targets"]) for i in range(3)] == [3, 1, 2]


def test_decoded_once_or_as_read_is_the_same(pictures: Path, cache: Path) -> None:
    source = ImageFolder(path=str(pictures))
    small = open_store(source, 5, 1, cache, megabytes=1, workers=1)
    large = open_store(source, 5, 1, cache, megabytes=0, workers=3)
    assert isinstance(small, Decoded) and isinstance(large, Decoding)
    indices = np.array([20, 3, 3, 11])
    assert small.pixels(indices).shape == (4, 5, 5, 1)
    assert (small.pixels(indices) == large.pixels(indices)).all()
    assert (small.labels == large.labels).all()


def test_fit_scales_the_shorter_side_and_keeps_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (fit(pixels, 10, 3) == 200).all()
    assert fit(pixels, 10, 1).shape == (10, 10, 1)
    assert fit(pixels, 4, 3).shape == (4, 4, 3)
    grey = np.full((8, 8, 1), 7, np.uint8)
    assert fit(grey, 8, 1) is grey
    assert (fit(grey, 8, 3) == 7).all()
