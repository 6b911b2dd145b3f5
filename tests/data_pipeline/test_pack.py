from pathlib import Path

import pytest

from core.config import parse
from core.errors import UserError
from data_pipeline.config import DataConfig, WeightedSource
from data_pipeline.data import Kind
from data_pipeline.pack import pack
from data_pipeline.sources.folder import ImageFolder
from data_pipeline.sources.shards import WebDataset
from data_pipeline.sources.text import Text


def item(path: Path) -> WeightedSource:
    (source,) = parse(DataConfig, {"sources": str(path)}).sources
    assert isinstance(source, WeightedSource)
    return source


def test_text_comes_back_exactly(documents: Path, tmp_path: Path) -> None:
    (documents / "99.txt").write_bytes("\u2581\r\n\ttabs  é\0".encode())
    shards = pack(item(documents), "language", tmp_path / "out", samples=15)
    assert [shard.name for shard in shards] == [f"shard-00000{n}.tar" for n in range(3)]
    before = [d.text for d in Text(path=str(documents)).documents()]
    assert [d.text for d in WebDataset(path=str(tmp_path / "out/*.tar")).documents()] == before


def test_images_come_back_exactly(pictures: Path, tmp_path: Path) -> None:
    pack(item(pictures), "vision", tmp_path / "out", samples=10)
    before = ImageFolder(path=str(pictures))
    after = WebDataset(path=str(tmp_path / "out/*.tar"))
    assert after.classes() == before.classes()
    assert (after.labels() == before.labels()).all()
    assert all((after.read(i) == before.read(i)).all() for i in range(24))


@pytest.mark.parametrize("kind", ["language", "vision"])
def test_packing_again_gives_the_same_bytes(
    documents: Path, pictures: Path, tmp_path: Path, kind: Kind
) -> None:
    source = item(documents if kind == "language" else pictures)
    (one,), (two,) = (pack(source, kind, tmp_path / name) for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_a_shard_closes_at_its_size(documents: Path, tmp_path: Path) -> None:
    shards = pack(item(documents), "language", tmp_path / "out", megabytes=0.001)
    assert len(shards) > 3


def test_nothing_is_overwritten_and_nothing_half_written(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        pack(item(documents), "language", documents)
    (documents / "40.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"40\.txt: not UTF-8"):
        pack(item(documents), "language", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["documents"]
