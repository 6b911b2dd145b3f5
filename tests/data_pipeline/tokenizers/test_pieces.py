import inspect
import textwrap

import pytest

from core.errors import UserError
from core.registry import build

TEXT = [
    inspect.getsource(textwrap),
    "Ünïcödé text, 漢字 and 😀; a tab\there,  two spaces, and\r\nanother line.\n" * 20,
]


class Corpus(list[str]):
    @property
    def characters(self) -> int:
        return sum(map(len, self))


def test_pieces_are_learned() -> None:
    for model in ("unigram", "bpe"):
        tokenizer = build("tokenizer", {"name": "sentencepiece", "vocab": 500, "model": model})
        tokenizer.train(Corpus(TEXT))
        assert len(tokenizer.encode(TEXT[0])) < len(TEXT[0]) / 2


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
