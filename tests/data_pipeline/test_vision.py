"""Vision data end to end, from config to images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config import parse
from core.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.inspect import describe
from data_pipeline.open import Data, open_data


def vision(cache: Path, seed: int = 0, **values: Any) -> Data:
    return open_data(parse(DataConfig, values), "vision", seed, cache)


def test_digits_open(cache: Path) -> None:
    data = vision(cache, sources="sklearn_digits", augment=["shift"], validation={"fraction": 0.2})
    assert data.image_shape == (1, 8, 8) and data.classes == [str(d) for d in range(10)]
    assert len(data.train) + len(data.validation) == 1797
    counts = data.facts["validation"]
    assert all(34 <= count <= 37 for count in counts.values())
    sample = data.train[0]
    assert sample["images"].shape == (1, 8, 8) and sample["targets"].dtype == torch.int64
    assert "class 3: " in "\n".join(describe(data))
    held = np.stack([data.validation[i]["images"].numpy() for i in range(len(data.validation))])
    assert abs(float(held.mean())) < 0.05


def test_held_out_images_are_never_trained_on(pictures: Path, cache: Path) -> None:
    # Every picture is random pixels, so none occurs twice.
    data = vision(cache, sources=str(pictures), validation={"fraction": 0.25}, image_size=6)
    train = {data.train[i]["images"].numpy().tobytes() for i in range(len(data.train))}
    held = {data.validation[i]["images"].numpy().tobytes() for i in range(len(data.validation))}
    assert (len(train), len(held)) == (18, 6) and not train & held


def test_images_resized_with_given_normalisation(pictures: Path, cache: Path) -> None:
    data = vision(
        cache,
        sources=str(pictures),
        image_size=4,
        channels=1,
        mean=[0.5],
        std=[0.25],
    )
    assert data.image_shape == (1, 4, 4)
    assert data.facts["mean"] == [0.5]
    assert data.train[0]["images"].abs().max() <= 2.0


def test_classes_must_agree(pictures: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"image_folder has other classes than .*sklearn_digits"):
        vision(cache, sources=["sklearn_digits", str(pictures)])
