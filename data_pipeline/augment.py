"""Random changes to training images. Each is drawn from the words it is given, and nothing else.

Axes: B images, H height, W width, C channels.
"""

from __future__ import annotations

from typing import Annotated, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from core.registry import register
from data_pipeline.order import Words, below

PixelsBHWC = npt.NDArray[np.uint8]


class Augmentation(Protocol):
    def __call__(self, pixels_BHWC: PixelsBHWC, words_B: Words) -> PixelsBHWC:
        """Changed copies of the images, image b by the random word b alone."""


@register("augmentation", "shift", title="random crop of a zero-padded image")
class Shift:
    """Pad with black on every side, then crop a random place of the original size.

    The augmentation of small images in He et al. (2015, 1512.03385).

    Args:
        pixels: the padding, and so the largest shift.
    """

    def __init__(self, *, pixels: Annotated[int, Field(ge=1)] = 1):
        self.pixels = pixels

    def __call__(self, pixels_BHWC: PixelsBHWC, words_B: Words) -> PixelsBHWC:
        batch, height, width, _ = pixels_BHWC.shape
        pad = self.pixels
        padded = np.pad(pixels_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        places = below(words_B, (2 * pad + 1) ** 2)
        rows, columns = np.divmod(places, 2 * pad + 1)
        return padded[
            np.arange(batch)[:, None, None],
            (rows[:, None] + np.arange(height))[:, :, None],
            (columns[:, None] + np.arange(width))[:, None, :],
        ]


@register("augmentation", "flip", title="random horizontal flip")
class Flip:
    """Mirror left and right.

    Args:
        probability: of an image being mirrored.
    """

    def __init__(self, *, probability: Annotated[float, Field(ge=0, le=1)] = 0.5):
        self.probability = probability

    def __call__(self, pixels_BHWC: PixelsBHWC, words_B: Words) -> PixelsBHWC:
        chosen = below(words_B, 2**32) < self.probability * 2**32
        out = pixels_BHWC.copy()
        out[chosen] = pixels_BHWC[chosen][:, :, ::-1]
        return out
