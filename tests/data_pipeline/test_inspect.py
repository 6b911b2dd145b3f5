from pathlib import Path

from core.config import parse
from data_pipeline.config import DataConfig
from data_pipeline.inspect import describe
from data_pipeline.open import open_data


def test_language(documents: Path, cache: Path) -> None:
    config = parse(DataConfig, {"sources": str(documents), "sequence": 16})
    data = open_data(config, "language", 0, cache)
    lines = describe(data)
    facts = data.facts["0: text"]
    total = sum(path.stat().st_size for path in documents.iterdir())
    assert facts["train"]["bytes"] + facts["validation"]["bytes"] == total
    assert lines[0] == "tokenizer bytes: 257 ids"
    assert lines[1] == "source 0: text (held out by document)"
    documents_, bytes_ = facts["train"]["documents"], facts["train"]["bytes"]
    assert lines[2] == (
        f"  train: {documents_} documents, {bytes_:,} bytes, {bytes_ + documents_:,} tokens, "
        f"1.000 bytes per token"
    )
    assert lines[-1].startswith("the first: 'Document ")


def test_vision(pictures: Path, cache: Path) -> None:
    config = parse(DataConfig, {"sources": str(pictures), "validation": {"fraction": 0.25}})
    lines = describe(open_data(config, "vision", 0, cache))
    assert lines[0].startswith("images: 3 channels, 6 × 6 pixels; mean 0.")
    assert lines[1] == "samples: 18 to train on, 6 held out"
    assert lines[2:4] == [
        "  class cat: 9 to train on, 3 held out",
        "  class dog: 9 to train on, 3 held out",
    ]
    assert [len(line) for line in lines[5:]] == [2 + 12] * 6
