"""Small data sets, written afresh for each test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.config import parse
from data_pipeline.config import DataConfig

PROSE = "The quick brown fox jumps over the lazy dog. "


def data_config(**values: Any) -> DataConfig:
    return parse(DataConfig, values)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Forty text files of different text and length."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(40):
        text = f"Document {number}.\n" + PROSE * (1 + number % 7)
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of twelve colour images, 6 × 9 pixels."""
    folder = tmp_path / "pictures"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 9, 3), dtype=np.uint8)
    for number in range(24):
        home = folder / ("cat" if number < 12 else "dog")
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(home / f"{number:02d}.png")
    return folder
