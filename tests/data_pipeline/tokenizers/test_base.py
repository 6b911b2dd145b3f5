"""Every tokenizer: exact round trips, exact byte counts, saved and loaded alike."""

import inspect
import textwrap
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.registry import build
from data_pipeline.tokenizers.base import Tokenizer

TEXT = [
    inspect.getsource(textwrap),
    "Ünïcödé text, 漢字 and 😀; a tab\there,  two spaces, and\r\nanother line.\n" * 20,
]


SPECS = {
    "bytes": {"name": "bytes"},
    "characters": {"name": "characters", "byte_fallback": True},
    "unigram": {"name": "sentencepiece", "vocab": 500},
    "bpe": {"name": "sentencepiece", "vocab": 500, "model": "bpe"},
}


every = pytest.mark.parametrize("kind", list(SPECS))


class Corpus(list[str]):
    @property
    def characters(self) -> int:
        return sum(map(len, self))


@cache
def trained(kind: str) -> Tokenizer:
    tokenizer: Tokenizer = build("tokenizer", SPECS[kind])
    tokenizer.train(Corpus(TEXT))
    return tokenizer


hard_text = st.text() | st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\0",
            "▁",
            "<s>",
            "</s>",
            "<unk>",
            "<0x41>",
            "def",
            "漢",
            "é",
            "\u2585",
            "\u200b",
            "e\u0301",
            "ﬁ",
            "\ufeff",
            "\U0001f600",
        ]
    )
).map("".join)


@every
@given(text=hard_text)
def test_round_trip_is_exact(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    lengths = tokenizer.token_bytes()
    assert sum(lengths[i] for i in ids) == len(text.encode("utf8"))
    assert tokenizer.end not in ids


@every
def test_ids_are_within_the_vocabulary(kind: str) -> None:
    tokenizer = trained(kind)
    ids = [i for text in TEXT for i in tokenizer.encode(text)]
    assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size == len(tokenizer.token_bytes())
    assert 0 <= tokenizer.end < tokenizer.vocab_size
    assert tokenizer.token_bytes()[tokenizer.end] == 0
    assert tokenizer.decode([*tokenizer.encode("wrap"), tokenizer.end]) == "wrap"


@every
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXT[1]) == tokenizer.encode(TEXT[1])
    assert (loaded.end, loaded.vocab_size) == (tokenizer.end, tokenizer.vocab_size)
    assert loaded.fingerprint() == tokenizer.fingerprint()


@every
def test_training_again_gives_the_same_bytes(kind: str) -> None:
    again: Tokenizer = build("tokenizer", SPECS[kind])
    again.train(Corpus(TEXT))
    assert again.files() == trained(kind).files()


def test_fingerprints_differ() -> None:
    assert len({trained(kind).fingerprint() for kind in SPECS}) == len(SPECS)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer: .*tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
