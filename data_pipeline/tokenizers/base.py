"""What a tokenizer is: text to ids and back, exactly.

Every tokenizer here loses nothing: `decode(encode(text)) == text`, and the entries of
`token_bytes()` over an encoding sum to the text's length in UTF-8, so that bits per byte can be
computed from token losses alone.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.hashing import stable_hash
from core.registry import build

Ids = npt.NDArray[np.int64]
DESCRIPTION = "tokenizer.json"


class Corpus(Protocol):
    """The training text, to be read as often as needed."""

    @property
    def characters(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


class Tokenizer(ABC):
    """Text to ids and back."""

    name: ClassVar[str]
    end: int
    """The id that closes a document; it stands for no text."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are."""

    @abstractmethod
    def encode_array(self, text: str) -> Ids:
        """The ids of a text, without `end`."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of ids; `end` is nothing, and bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> list[int]:
        """Bytes of UTF-8 text that each id stands for."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `end`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def train(self, corpus: Corpus) -> None:  # noqa: B027 - fixed vocabularies learn nothing
        """Learn the vocabulary from text."""

    def options(self) -> dict[str, Any]:
        """The options that build this tokenizer again."""
        return {}

    def files(self) -> dict[str, bytes]:
        """What was learned, as files."""
        return {}

    def restore(self, files: dict[str, bytes]) -> None:  # noqa: B027
        """Take back what `files` gave."""

    def fingerprint(self) -> str:
        """The same for tokenizers that encode alike."""
        files = self.files()
        parts = [part for name in sorted(files) for part in (name, files[name])]
        return f"{stable_hash(self.name, json.dumps(self.options(), sort_keys=True), *parts):016x}"

    def save(self, folder: str | Path) -> None:
        """Write everything that `load` needs into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name, body in files.items():
            (folder / name).write_bytes(body)
        description = {"name": self.name, **self.options(), "files": sorted(files)}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """A tokenizer that `save` wrote.

        Raises:
            UserError: if the folder does not hold one.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            names = description.pop("files")
            files = {name: (folder / name).read_bytes() for name in names}
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no tokenizer: {error.filename} is missing") from None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / DESCRIPTION}: cannot be read: {error}") from None
        tokenizer = build("tokenizer", description)
        assert isinstance(tokenizer, Tokenizer)
        tokenizer.restore(files)
        return tokenizer
