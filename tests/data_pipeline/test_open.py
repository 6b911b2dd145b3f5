"""Opening data: every kind, several processes, and what is wrong with the input."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from core.config import parse
from core.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.inspect import describe
from data_pipeline.open import Data, open_data


def language(cache: Path, seed: int = 0, **values: Any) -> Data:
    return open_data(parse(DataConfig, {"sequence": 16, **values}), "language", seed, cache)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("language", {"sources": "sklearn_digits"}, "sklearn_digits has no text; .*python_stdlib"),
        ("vision", {"sources": "python_stdlib"}, "has no images; .*sklearn_digits"),
        ("vision", {"sources": "sklearn_digits", "validation": {"by": "tail"}}, "tail is for text"),
        (
            "vision",
            {"sources": "sklearn_digits", "mean": [0.1] * 3, "std": [1.0] * 3},
            "data.mean has 3 numbers, but the images have 1 channels",
        ),
        ("sound", {}, "no kind 'sound'; valid: language, vision"),
    ],
)
def test_impossible_combinations(
    cache: Path, kind: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_data(parse(DataConfig, values), kind, 0, cache)


def test_bad_input_gets_one_line(tmp_path: Path, documents: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"document: no such file .*did you mean 'documents'"):
        language(cache, sources=str(tmp_path / "document"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="source text: there is no text in it"):
        language(cache, sources=str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text: byte 0xe9 at offset 3"):
        language(cache, sources=str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match=r"data\.sequence is 99999, but the text has"):
        language(cache, sources=str(documents), sequence=99999)
    with pytest.raises(UserError, match="at most"):
        language(cache, sources=str(documents), tokenizer={"name": "sentencepiece"})


def test_processes_may_open_together(documents: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=language, args=(cache,), kwargs={"sources": str(documents)})
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(list(cache.glob("tokens/*/train.bin"))) == 1


def test_the_standard_library_opens(cache: Path) -> None:
    data = language(cache, sources={"name": "python_stdlib", "max_megabytes": 0.3})
    sample = data.train[3]
    assert {key: tuple(value.shape) for key, value in sample.items()} == dict.fromkeys(
        ("tokens", "targets", "documents", "positions"), (16,)
    )
    lines = describe(data)
    assert lines[0] == "tokenizer bytes: 257 ids"
    assert any("1.000 bytes per token" in line for line in lines)
