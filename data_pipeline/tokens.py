"""Token files: a source's documents, tokenised once, each closed by `end`.

For each side (train, validation) a folder holds `<side>.bin`, the tokens as little-endian
integers of 2 or 4 bytes, `<side>.starts.npy`, where each document starts, and for the held-out
side `validation.txt`, its text. `tokens.json` gives the counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_pipeline.order import Indices
from data_pipeline.split import SplitText
from data_pipeline.tokenizers.base import Tokenizer

SIDES = ("train", "validation")
_DESCRIPTION = "tokens.json"


@dataclass(frozen=True)
class Tokens:
    """One side of a source."""

    ids: npt.NDArray[Any]
    """All documents' tokens in order, mapped from the file."""
    starts: Indices
    """Where each document starts in `ids`."""
    bytes: int
    """UTF-8 bytes of the text."""


class _Writer:
    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike, tokenizer: Tokenizer):
        self.file, self.dtype, self.tokenizer = file, dtype, tokenizer
        self.starts: list[int] = []
        self.tokens = 0
        self.bytes = 0

    def add(self, text: str) -> None:
        if not text:
            return
        ids = np.append(self.tokenizer.encode_array(text), self.tokenizer.end)
        self.file.write(ids.astype(self.dtype).tobytes())
        self.starts.append(self.tokens)
        self.tokens += len(ids)
        self.bytes += len(text.encode("utf8"))


def write_tokens(folder: Path, source: SplitText, tokenizer: Tokenizer) -> None:
    """Tokenise both sides of a source in one pass."""
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    with (
        open(folder / "train.bin", "wb") as train_file,
        open(folder / "validation.bin", "wb") as validation_file,
        open(folder / "validation.txt", "wb") as text_file,
    ):
        train = _Writer(train_file, dtype, tokenizer)
        validation = _Writer(validation_file, dtype, tokenizer)
        for training_text, held_text in source.parts():
            train.add(training_text)
            validation.add(held_text)
            text_file.write(held_text.encode("utf8"))
    description: dict[str, Any] = {"dtype": dtype, "split": source.plan.how}
    for side, writer in zip(SIDES, (train, validation), strict=True):
        np.save(folder / f"{side}.starts.npy", np.asarray(writer.starts, dtype=np.int64))
        description[side] = {"tokens": writer.tokens, "bytes": writer.bytes}
    (folder / _DESCRIPTION).write_text(json.dumps(description))


def read_tokens(folder: Path, side: str) -> Tokens:
    """One side of what `write_tokens` wrote, mapped into memory."""
    description = json.loads((folder / _DESCRIPTION).read_text())
    counts = description[side]
    ids: npt.NDArray[Any] = np.zeros(0, dtype=description["dtype"])
    if counts["tokens"]:  # an empty file cannot be mapped
        ids = np.asarray(np.memmap(folder / f"{side}.bin", dtype=description["dtype"], mode="r"))
    assert len(ids) == counts["tokens"]
    return Tokens(ids, np.load(folder / f"{side}.starts.npy"), counts["bytes"])


def split_of(folder: Path) -> str:
    """How the source was divided."""
    return str(json.loads((folder / _DESCRIPTION).read_text())["split"])
