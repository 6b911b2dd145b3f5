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
        [" ", "  ", "\t", "\n", "\r\n", "\0", "▁", "<s>", "</s>", "<unk>", "<0x41>", "def", "漢",
         "é", "\u2585", "\u200b", "e\u0301", "ﬁ", "\ufeff", "\U0001f600"]
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


def test_bytes_that_are_not_text_decode_to_a_mark() -> None:
    assert trained("bytes").decode([0xFF, 65]) == "�A"


def test_pieces_are_learned() -> None:
    for kind in ("unigram", "bpe"):
        assert len(trained(kind).encode(TEXT[0])) < len(TEXT[0]) / 2


def test_characters_are_sorted_and_unique() -> None:
    tokenizer: Tokenizer = build("tokenizer", "characters")
    tokenizer.train(Corpus(["banana", "cab"]))
    assert tokenizer.encode("abcn") == [0, 1, 2, 3]
    assert tokenizer.vocab_size == 5 and tokenizer.end == 4


def test_an_unknown_character_is_named() -> None:
    tokenizer: Tokenizer = build("tokenizer", "characters")
    tokenizer.train(Corpus(["abc"]))
    with pytest.raises(UserError, match=r"character 'é' is not in .*byte_fallback=true"):
        tokenizer.encode("abé")


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_too_large_a_vocabulary_names_the_largest_that_fits(model: str) -> None:
    tokenizer = build("tokenizer", {"name": "sentencepiece", "vocab": 4096, "model": model})
    with pytest.raises(UserError, match=r"too small for a vocabulary of 4096; .* at most \d") as e:
        tokenizer.train(Corpus(TEXT))
    most = int(str(e.value).split("at most ")[1].split(",")[0])
    fits = build("tokenizer", {"name": "sentencepiece", "vocab": most, "model": model})
    fits.train(Corpus(TEXT))
    assert fits.vocab_size == most


def test_too_small_a_vocabulary_and_no_text() -> None:
    many = "".join(chr(0x4E00 + i) for i in range(500))
    with pytest.raises(UserError, match="too many characters for a vocabulary of 300") as caught:
        build("tokenizer", {"name": "sentencepiece", "vocab": 300}).train(Corpus([many]))
    least = int(str(caught.value).rsplit(" ", 1)[1])
    build("tokenizer", {"name": "sentencepiece", "vocab": least}).train(Corpus([many]))
    with pytest.raises(UserError, match="no training text"):
        build("tokenizer", {"name": "sentencepiece", "vocab": 300}).train(Corpus([]))


def test_the_sample_is_capped_and_spread() -> None:
    tokenizer = build("tokenizer", {"name": "sentencepiece", "max_megabytes": 0.01})
    text = "".join(f"{number:09d}\n" for number in range(20_000))
    chunks = list(tokenizer._sample(Corpus([text])))
    assert sum(map(len, chunks)) <= 10_000
    assert chunks[0].startswith("000000000") and chunks[-1] > "00001"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer: .*tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
