"""Language data end to end, from config to windows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import parse
from data_pipeline.config import DataConfig
from data_pipeline.dataset import Mixture
from data_pipeline.loader import Loader
from data_pipeline.open import Data, open_data


def language(cache: Path, seed: int = 0, **values: Any) -> Data:
    return open_data(parse(DataConfig, {"sequence": 16, **values}), "language", seed, cache)


def same(a: Data, b: Data) -> bool:
    return len(a.train) == len(b.train) and all(
        torch.equal(a.train[i][key], b.train[i][key])
        for i in range(0, len(a.train), 7)
        for key in a.train[i]
    )


@pytest.mark.parametrize(
    "tokenizer", ["bytes", "characters", {"name": "sentencepiece", "vocab": 300, "model": "bpe"}]
)
def test_every_text_is_read_once_and_comes_back(
    documents: Path, cache: Path, tokenizer: Any
) -> None:
    data = language(cache, sources=str(documents), tokenizer=tokenizer, documents="joined")
    assert data.tokenizer is not None
    held = data.validation_text().decode()
    ids = [int(t) for i in range(len(data.validation)) for t in data.validation[i]["tokens"]]
    texts = [path.read_text() for path in sorted(documents.iterdir())]
    assert data.tokenizer.decode(ids) == held
    train = data.tokenizer.decode(
        [int(t) for i in range(len(data.train)) for t in data.train[i]["tokens"]]
    )
    out = [text for text in texts if text in held]
    assert "".join(out) == held and 0 < len(out) < 20
    assert "".join(text for text in texts if text not in out).startswith(train)


def test_held_out_bytes_are_what_the_targets_stand_for(documents: Path, cache: Path) -> None:
    data = language(cache, sources=str(documents), documents="joined")
    assert data.tokenizer is not None
    lengths = torch.tensor(data.tokenizer.token_bytes())
    targets = torch.cat([data.validation[i]["targets"] for i in range(len(data.validation))])
    counted = int(lengths[targets[targets >= 0]].sum())
    assert counted == len(data.validation_text()) - 1  # nothing precedes the very first byte


def test_a_second_opening_reads_the_cache(
    documents: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"name": "sentencepiece", "vocab": 300}
    first = language(cache, sources=str(documents), tokenizer=spec)

    def refuse(*args: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("data_pipeline.tokenizers.pieces.SentencePiece.train", refuse)
    monkeypatch.setattr("data_pipeline.tokenizers.pieces.SentencePiece.encode_array", refuse)
    assert same(first, language(cache, sources=str(documents), tokenizer=spec))
    with pytest.raises(AssertionError, match="tokenised again"):
        language(cache, sources=str(documents), tokenizer={**spec, "vocab": 301})


def test_changed_text_is_tokenised_again(documents: Path, cache: Path) -> None:
    first = language(cache, sources=str(documents), validation={"by": "tail"})
    (documents / "00.txt").write_text("ANOTHER TEXT " * 20)
    second = language(cache, sources=str(documents), validation={"by": "tail"})
    assert second.tokenizer is not None and not same(first, second)
    assert second.tokenizer.decode(second.train[0]["tokens"].tolist()) == "ANOTHER TEXT ANO"


@pytest.mark.parametrize("file", ["train.bin", "train.starts.npy", "tokens.json", "validation.txt"])
@pytest.mark.parametrize("damage", ["truncate", "corrupt"])
def test_a_damaged_token_file_is_rebuilt(
    documents: Path, cache: Path, file: str, damage: str
) -> None:
    first = language(cache, sources=str(documents))
    held = first.validation_text()
    (path,) = cache.glob(f"tokens/*/{file}")
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        del data[-2:]
    else:
        data[len(data) // 2] ^= 1
    path.unlink()  # the first opening may still map the old file
    path.write_bytes(data)
    second = language(cache, sources=str(documents))
    assert same(first, second) and second.validation_text() == held


def test_the_split_does_not_depend_on_the_run(documents: Path, cache: Path) -> None:
    one = language(cache, seed=1, sources=str(documents))
    two = language(cache, seed=2, sources=str(documents))
    assert one.validation_text() == two.validation_text()


def test_random_windows_depend_on_the_seed(documents: Path, cache: Path) -> None:
    values: dict[str, Any] = {"sources": str(documents), "windows": "random"}
    one, again, two = (language(cache, seed=s, **values) for s in (1, 1, 2))
    assert same(one, again) and not same(one, two)
    fixed_one, fixed_two = (language(cache, seed=s, sources=str(documents)) for s in (1, 2))
    assert same(fixed_one, fixed_two)


def test_sources_mix_by_weight(documents: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "z.txt").write_text("zzzz" * 2000)
    data = language(
        cache,
        sources=[{"name": "text", "path": str(documents), "weight": 3}, str(tmp_path / "z.txt")],
        validation={"by": "tail"},
    )
    assert isinstance(data.train, Mixture)
    (batch,) = Loader(data.train, 0, 2000, 2000).step(0)
    pure = (batch["tokens"] == ord("z")).all(dim=1).float().mean().item()
    assert pure == pytest.approx(0.25, abs=0.03)
    assert data.validation_text().endswith(b"zzzz")


def test_validation_may_have_its_own_sources(documents: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "held.txt").write_text("held out text " * 9)
    data = language(
        cache, sources=str(documents), validation={"sources": str(tmp_path / "held.txt")}
    )
    assert data.validation_text() == (tmp_path / "held.txt").read_bytes()
    tokens = sum(facts["train"]["bytes"] for facts in data.facts.values())
    assert tokens == sum(path.stat().st_size for path in documents.iterdir())


def test_each_tokenizer_has_its_own_tokens(documents: Path, cache: Path) -> None:
    for name in ("bytes", "characters", "bytes"):
        data = language(cache, sources=str(documents), tokenizer=name)
        assert data.tokenizer is not None and data.tokenizer.name == name
        text = data.tokenizer.decode(data.train[0]["tokens"].tolist())
        assert text.startswith("Document ")
