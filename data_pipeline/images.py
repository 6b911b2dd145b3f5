"""Sets of images: decoded, resized, normalised.

Axes: N images of a store, B images of a batch, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.augment import Augmentation, PixelsBHWC
from data_pipeline.cache import cached, key
from data_pipeline.dataset import Batch, BatchedDataset
from data_pipeline.order import Indices, random_words
from data_pipeline.sources.base import ImageSource, Pixels

_MEASURED = 4096  # images that mean and std are measured on, where there are more


class Store(Protocol):
    """All images of a source at one size."""

    labels: Indices

    def pixels(self, indices: Indices) -> PixelsBHWC: ...


class Decoded:
    """Images decoded once into an array in the cache."""

    def __init__(self, pixels_NHWC: PixelsBHWC, labels: Indices):
        self.pixels_NHWC = pixels_NHWC
        self.labels = labels

    def pixels(self, indices: Indices) -> PixelsBHWC:
        return self.pixels_NHWC[indices]


class Decoding:
    """Images decoded as they are read, by several threads."""

    def __init__(self, source: ImageSource, size: int, channels: int, workers: int):
        self.source = source
        self.size, self.channels = size, channels
        self.labels = source.labels()
        self.pool = ThreadPoolExecutor(workers, "decode")

    def pixels(self, indices: Indices) -> PixelsBHWC:
        read = partial(_read, self.source, self.size, self.channels)
        return np.stack(list(self.pool.map(read, indices.tolist())))


def open_store(
    source: ImageSource, size: int, channels: int, cache: Path, megabytes: int, workers: int
) -> Store:
    """The images of a source, in the cache if they are small enough for it."""
    count = len(source.labels())
    if count * size * size * channels > megabytes * 10**6:
        return Decoding(source, size, channels, workers)

    def build(folder: Path) -> None:
        shape = (count, size, size, channels)
        array = np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, shape)
        for index in range(count):
            array[index] = _read(source, size, channels, index)
        array.flush()
        np.save(folder / "labels.npy", source.labels())

    name = key("images", 1, source.fingerprint(), size, channels)
    folder = cached(cache / "images" / name, build)
    pixels = np.asarray(np.load(folder / "pixels.npy", mmap_mode="r"))
    return Decoded(pixels, np.load(folder / "labels.npy"))


def _read(source: ImageSource, size: int, channels: int, index: int) -> Pixels:
    return fit(source.read(index), size, channels)


def fit(pixels: Pixels, size: int, channels: int) -> Pixels:
    """An image at the size and channels asked for: the shorter side scaled, the centre kept."""
    height, width, have = pixels.shape
    if (height, width, have) == (size, size, channels):
        return pixels
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if have == 1 else pixels)
    if have != channels:
        image = image.convert("L" if channels == 1 else "RGB")
    scale = size / min(height, width)
    if scale != 1:
        wide, high = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    array = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)
    return array[:, :, None] if channels == 1 else array


def measure(stores: Sequence[tuple[Store, Indices]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels in 0..1, over the given images."""
    sums: npt.NDArray[np.float64] | float = 0.0
    squares: npt.NDArray[np.float64] | float = 0.0
    count = 0
    for store, indices in stores:
        step = max(1, -(-len(indices) // _MEASURED))
        for block in np.array_split(indices[::step], max(1, len(indices[::step]) // 64)):
            pixels = store.pixels(block).astype(np.float64) / 255
            sums = sums + pixels.sum(axis=(0, 1, 2))
            squares = squares + (pixels**2).sum(axis=(0, 1, 2))
            count += pixels.size // pixels.shape[-1]
    mean = np.asarray(sums) / count
    deviation = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0))
    # Images of one flat colour have no deviation to divide by.
    return mean.tolist(), np.where(deviation > 1e-6, deviation, 1.0).tolist()


class Images(BatchedDataset):
    """Images of one side of a source: `images` CHW float32, normalised, and `targets`.

    Args:
        store: the pixels.
        indices: which of the store's images belong to the set.
        mean, std: per channel, of pixels in 0..1.
        augment: random changes, applied in order; image g of the run is changed by a hash of
            (seed, g), differently in every epoch.
        seed: of these changes.
    """

    def __init__(
        self,
        store: Store,
        indices: Indices,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[Augmentation] = (),
        seed: int = 0,
    ):
        self.store = store
        self.indices = indices
        self.augment = list(augment)
        self.seed = seed
        # (x / 255 - mean) / std, as one multiplication and one addition.
        self.scale = (1 / (255 * np.asarray(std))).astype(np.float32)
        self.offset = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Indices, draws: Indices) -> Batch:
        chosen = self.indices[indices]
        pixels = self.store.pixels(chosen)
        for number, change in enumerate(self.augment):
            pixels = change(pixels, random_words(self.seed + number, draws))
        images_BHWC = pixels.astype(np.float32) * self.scale + self.offset
        images_BCHW = np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2))
        return {
            "images": torch.from_numpy(images_BCHW),
            "targets": torch.from_numpy(self.store.labels[chosen]),
        }
