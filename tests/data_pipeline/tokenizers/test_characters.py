import pytest

from core.errors import UserError
from core.registry import build
from data_pipeline.tokenizers.base import Tokenizer


class Corpus(list[str]):
    @property
    def characters(self) -> int:
        return sum(map(len, self))


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
