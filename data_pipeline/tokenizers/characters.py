"""Characters as tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from core.errors import UserError
from core.registry import register
from data_pipeline.tokenizers.base import Corpus, Ids, Tokenizer

_FILE = "characters.json"


@register("tokenizer", "characters", title="characters of the training text")
class CharacterTokenizer(Tokenizer):
    """One id for each character of the training text, sorted; then the bytes; then `end`.

    Args:
        byte_fallback: add 256 ids for bytes, so that a character that the training text lacks is
            spelled as its UTF-8 bytes; without it such a character is an error.
    """

    name = "characters"

    def __init__(self, *, byte_fallback: bool = False):
        self.byte_fallback = byte_fallback
        self._take("")

    def _take(self, alphabet: str) -> None:
        self.alphabet = alphabet
        points = np.frombuffer(alphabet.encode("utf-32-le"), dtype=np.uint32)
        self._id_of_point = np.full(0x110000, -1, dtype=np.int32)
        self._id_of_point[points] = np.arange(len(points), dtype=np.int32)
        self.end = len(alphabet) + (256 if self.byte_fallback else 0)

    @property
    def vocab_size(self) -> int:
        return self.end + 1

    def train(self, corpus: Corpus) -> None:
        seen: set[str] = set()
        for text in corpus:
            seen |= set(text)
        self._take("".join(sorted(seen)))

    def encode_array(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_point[points].astype(np.int64)
        unknown = np.flatnonzero(ids < 0)
        if not len(unknown):
            return ids
        if not self.byte_fallback:
            raise UserError(
                f"character {text[int(unknown[0])]!r} is not in the training text; set "
                f"data.tokenizer.byte_fallback=true to spell such characters as bytes"
            )
        pieces, start = [], 0
        for place in unknown.tolist():
            spelled = np.frombuffer(text[place].encode("utf8"), dtype=np.uint8)
            pieces += [ids[start:place], len(self.alphabet) + spelled.astype(np.int64)]
            start = place + 1
        return np.concatenate([*pieces, ids[start:]])

    def decode(self, ids: list[int]) -> str:
        size = len(self.alphabet)
        spelled = b"".join(
            self.alphabet[i].encode("utf8") if i < size else bytes([i - size])
            for i in ids
            if i < self.end
        )
        return spelled.decode("utf8", errors="replace")

    def token_bytes(self) -> list[int]:
        lengths = [len(character.encode("utf8")) for character in self.alphabet]
        return lengths + [1] * (self.end - len(self.alphabet)) + [0]

    def options(self) -> dict[str, Any]:
        return {"byte_fallback": self.byte_fallback}

    def files(self) -> dict[str, bytes]:
        return {_FILE: json.dumps(self.alphabet).encode()}

    def restore(self, files: dict[str, bytes]) -> None:
        self._take(json.loads(files[_FILE]))
