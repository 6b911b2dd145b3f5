"""The handwritten digits that come inside scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from core.hashing import stable_hash
from core.registry import register
from data_pipeline.sources.base import Pixels


@register(
    "source",
    "sklearn_digits",
    title="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998)",
)
class SklearnDigits:
    """1,797 grey images of 8×8 pixels in ten classes, as scikit-learn carries them."""

    @cached_property
    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Pixels (1797, 8, 8, 1) and labels (1797,)."""
        from sklearn.datasets import load_digits

        data = load_digits()
        # Sixteen counts of ink per pixel, spread over the range of a byte.
        pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
        return pixels[:, :, :, None], data.target.astype(np.int64)

    def fingerprint(self) -> str:
        pixels, labels = self.arrays
        return f"{stable_hash(pixels.tobytes(), labels.tobytes()):016x}"

    def classes(self) -> Sequence[str]:
        return [str(digit) for digit in range(10)]

    def labels(self) -> npt.NDArray[np.int64]:
        return self.arrays[1]

    def read(self, index: int) -> Pixels:
        pixels: Pixels = self.arrays[0][index]
        return pixels
