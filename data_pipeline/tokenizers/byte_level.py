"""Bytes as tokens: nothing to learn, any text."""

from __future__ import annotations

import numpy as np

from core.registry import register
from data_pipeline.tokenizers.base import Ids, Tokenizer


@register("tokenizer", "bytes", title="UTF-8 bytes")
class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and `end`."""

    name = "bytes"
    end = 256

    @property
    def vocab_size(self) -> int:
        return 257

    def encode_array(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf8", errors="replace")

    def token_bytes(self) -> list[int]:
        return [1] * 256 + [0]
