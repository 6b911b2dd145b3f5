import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data_pipeline.sources.shards import WebDataset


def write(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "s-000.tar"
    write(path, {f"{n:03d}.txt": f"document {n}\n".encode() * 99 for n in range(6)})
    return path


def texts(source: WebDataset) -> list[str]:
    return [document.text for document in source.documents()]


def test_text_and_json_members(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"x/0.txt": "é\n".encode(), "x/1.json": b'{"body": "two"}'})
    source = WebDataset(path=str(tmp_path / "a.tar"), field="body")
    assert texts(source) == ["é\n", "two"]


def test_braces_globs_and_lists_name_shards(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"s-{number}.tar", {"a.txt": str(number).encode()})
    for path in (str(tmp_path / "s-{0..2}.tar"), str(tmp_path / "*.tar")):
        assert texts(WebDataset(path=path)) == ["0", "1", "2"]
    assert texts(WebDataset(path=[str(tmp_path / "s-2.tar"), str(tmp_path / "s-0.tar")])) == [
        "2",
        "0",
    ]


def test_images_are_random_access(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    pixels = []
    for number in range(5):
        array = np.full((4, 4, 3), number * 40, np.uint8)
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        members |= {f"{number}.cls": str(number % 3).encode(), f"{number}.PNG": file.getvalue()}
        pixels.append(array)
    write(tmp_path / "a.tar", members)
    source = WebDataset(path=str(tmp_path / "a.tar"))
    assert source.labels().tolist() == [0, 1, 2, 0, 1]
    assert source.classes() == ["0", "1", "2"]
    for number in (4, 0, 3):
        assert (source.read(number) == pixels[number]).all()
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert source.classes() == ["ant", "bee", "cat"]
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(UserError, match="names 1 classes, but the shards have class 2"):
        source.classes()


def test_a_shard_cut_after_indexing(shard: Path) -> None:
    source = WebDataset(path=str(shard))
    assert len(source.samples) == 6
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"truncated at offset 5000 inside 002\.txt"):
        texts(source)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.bin": b"x"}, r"sample 0 lacks text: .* \(it has \.bin\)"),
        ({"0.txt": b"\xff"}, r"0\.txt at offset 512: not UTF-8 text"),
        ({"0.json": b"{"}, r"0\.json at offset 512: not valid JSON"),
        ({"README": b"x"}, "hold no samples"),
        ({"0.txt": b"x", "0.TXT": b"x"}, r"0\.TXT at offset 1536 occurs twice"),
    ],
)
def test_bad_text_samples(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        texts(WebDataset(path=str(tmp_path / "a.tar")))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.png": b"x"}, "sample 0 lacks a class"),
        ({"0.cls": b"cat"}, r"0\.cls at offset 512: not a valid \.cls"),
        ({"0.cls": b"-1"}, "class -1 is below 0"),
    ],
)
def test_bad_labels(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        WebDataset(path=str(tmp_path / "a.tar")).labels()


def test_bad_images(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"0.png": b"xyz", "0.cls": b"1", "1.cls": b"0"})
    source = WebDataset(path=str(tmp_path / "a.tar"))
    with pytest.raises(UserError, match=r"a\.tar: 0\.png at offset 512: not a whole image"):
        source.read(0)
    with pytest.raises(UserError, match="sample 1 lacks an image"):
        source.read(1)
