"""SentencePiece, set up so that it loses nothing.

No normalisation, no dummy prefix, no collapsed whitespace, and bytes for rare characters. One gap
is left in the package: it writes a space as U+2581, so a U+2581 of the text would come back as a
space. Here that character is spelled as its three bytes, and decoding works on bytes throughout.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from core.errors import UserError
from core.registry import register
from data_pipeline.tokenizers.base import Corpus, Ids, Tokenizer

_SPACE = "\u2581"
_FILE = "sentencepiece.model"
_CHUNK = 1000  # characters of text handed to the trainer at a time


@register(
    "tokenizer",
    "sentencepiece",
    paper="1808.06226",
    title="SentencePiece: A simple and language independent subword tokenizer and detokenizer "
    "for Neural Text Processing",
)
class SentencePiece(Tokenizer):
    """Subword pieces learned from the training text (Kudo and Richardson, 2018).

    Args:
        vocab: number of ids, among them 256 bytes, `end` and one that is never used.
        model: unigram (Kudo, 2018, 1804.10959) or bpe (Sennrich et al., 2016, 1508.07909).
        max_megabytes: learn from this much text, taken evenly from all of it.
    """

    name = "sentencepiece"
    end = 1

    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=260)] = 4096,
        model: Literal["unigram", "bpe"] = "unigram",
        max_megabytes: Annotated[float, Field(gt=0)] = 2.0,
    ):
        self.vocab = vocab
        self.model = model
        self.max_megabytes = max_megabytes
        self.proto = b""

    @property
    def vocab_size(self) -> int:
        return self.vocab

    def train(self, corpus: Corpus) -> None:
        """Learn the pieces; the same text and options give the same bytes of model.

        Raises:
            UserError: if the text is too small for the vocabulary.
        """
        from sentencepiece import SentencePieceTrainer

        written = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=self._sample(corpus),
                model_writer=written,
                model_type=self.model,
                vocab_size=self.vocab,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                character_coverage=0.9995,
                max_sentence_length=8 * _CHUNK,
                num_threads=1,  # several threads sum in an order that varies
                unk_id=0,
                eos_id=self.end,
                bos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(self._explain(str(error))) from None
        self._take(written.getvalue())

    def _sample(self, corpus: Corpus) -> Iterator[str]:
        """Every n-th chunk of the text, with n such that the size cap holds."""
        stride = max(1, -(-corpus.characters // int(self.max_megabytes * 1e6)))
        count = 0
        for text in corpus:
            for start in range(0, len(text), _CHUNK):
                if count % stride == 0:
                    # The package takes NUL for a broken encoding, and cannot learn from it.
                    chunk = text[start : start + _CHUNK].replace("\0", " ")
                    yield chunk.replace(_SPACE, " ")
                count += 1

    def _explain(self, message: str) -> str:
        limit = re.search(r"too high.*<= (\d+)", message)
        if limit:
            return (
                f"tokenizer sentencepiece: the training text is too small for a vocabulary of "
                f"{self.vocab}; set data.tokenizer.vocab to at most {limit[1]}, or give more text"
            )
        needed = re.search(r"required_chars\. \d+ vs (\d+)", message)
        if needed:
            return (
                f"tokenizer sentencepiece: the training text has too many characters for a "
                f"vocabulary of {self.vocab}; set data.tokenizer.vocab to at least {needed[1]}"
            )
        if "!sentences_.empty()" in message:
            return "tokenizer sentencepiece: there is no training text to learn from"
        return f"tokenizer sentencepiece: training failed: {message}"

    def _take(self, proto: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self.proto = proto
        self._processor: Any = SentencePieceProcessor(model_proto=proto)
        self._bytes_of = [self._text_of(i) for i in range(self._processor.vocab_size())]
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._spelled_space = [byte_ids[byte] for byte in _SPACE.encode("utf8")]

    def _text_of(self, index: int) -> bytes:
        piece: str = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b""
        return piece.replace(_SPACE, " ").encode("utf8")

    def encode_array(self, text: str) -> Ids:
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE)):
            if number:
                ids += self._spelled_space
            ids += self._processor.encode(part)
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes_of[i] for i in ids).decode("utf8", errors="replace")

    def token_bytes(self) -> list[int]:
        return [len(text) for text in self._bytes_of]

    def options(self) -> dict[str, Any]:
        return {"vocab": self.vocab, "model": self.model, "max_megabytes": self.max_megabytes}

    def files(self) -> dict[str, bytes]:
        return {_FILE: self.proto}

    def restore(self, files: dict[str, bytes]) -> None:
        self._take(files[_FILE])
