"""`manyforms data`: inspect, pack, tokenizer."""

import pytest

from data_pipeline.tokenizers.base import Tokenizer
from launcher.cli import call


def test_inspect_a_config_and_a_source(tiny, capsys):
    assert call(["data", "inspect", str(tiny)]) == 0
    assert "tokenizer characters" in capsys.readouterr().out
    assert call(["data", "inspect", "sklearn_digits"]) == 0
    assert "8 × 8 pixels" in capsys.readouterr().out


def test_packed_shards_are_a_source(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    assert call(["data", "pack", str(text), str(tmp_path / "shards")]) == 0
    assert "1 shards" in capsys.readouterr().out
    assert call(["data", "inspect", str(tmp_path / "shards")]) == 0
    assert f"{int(text.stat().st_size * 0.95):,} bytes" in capsys.readouterr().out


def test_a_tokenizer_is_trained_and_saved(tiny, tmp_path, capsys):
    words = ["data", "tokenizer", str(tmp_path / "text.txt"), str(tmp_path / "tokenizer"),
             "data.tokenizer=sentencepiece", "data.tokenizer.vocab=300",
             "--text", "7 times 7"]  # fmt: skip
    assert call(words) == 0
    saved = Tokenizer.load(tmp_path / "tokenizer")
    assert saved.vocab_size == 300 and saved.decode(saved.encode("7 times 7")) == "7 times 7"
    shown = capsys.readouterr().out.splitlines()[-1]
    assert "".join(shown.split(" | ")) == "7 times 7" and "times" in shown


@pytest.mark.parametrize("source", ["sklearn_digits"])
def test_images_have_no_tokenizer(source, tmp_path, capsys):
    assert call(["data", "tokenizer", source, str(tmp_path / "out")]) == 2
    assert "images have no tokenizer" in capsys.readouterr().err
