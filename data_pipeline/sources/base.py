"""What a source of text and a source of images are.

Both have a `fingerprint`: the same for the same content, so that whatever was made from a source
(a tokenizer, a token file) can be cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # height, width, channels (1 or 3)


@dataclass(frozen=True)
class Document:
    """A piece of text that stands on its own, and where it came from."""

    name: str
    text: str


@runtime_checkable
class TextSource(Protocol):
    """A source of documents, in a fixed order."""

    def fingerprint(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...


@runtime_checkable
class ImageSource(Protocol):
    """A source of labelled images, in a fixed order."""

    def fingerprint(self) -> str: ...

    def classes(self) -> Sequence[str]:
        """The names of the classes, in the order of their numbers."""

    def labels(self) -> npt.NDArray[np.int64]:
        """The class number of every image; its length is the number of images."""

    def read(self, index: int) -> Pixels:
        """One image, decoded."""


def as_pixels(image: Any) -> Pixels:
    """A PIL image as grey (if it is grey) or RGB pixels."""
    grey = image.mode in ("1", "L", "I", "F", "I;16")
    pixels = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.uint8)
    return pixels[:, :, None] if grey else pixels
