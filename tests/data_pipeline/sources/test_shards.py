import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data_pipeline.sources.index import index_shard
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
        "2", "0",
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


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_indexed(tmp_path: Path, format: int) -> None:
    name = "long/" * 15 + "name.txt" if format == tarfile.USTAR_FORMAT else "x" * 150 + "é.txt"
    write(tmp_path / "a.tar", {name: b"abc", "b.txt": b""}, format)
    found = index_shard(tmp_path / "a.tar", None)
    assert [(m.name, m.size) for m in found] == [(name, 3), ("b.txt", 0)]
    assert (tmp_path / "a.tar").read_bytes()[found[0].offset :][:3] == b"abc"


def test_an_index_is_remembered_and_follows_the_file(shard: Path, cache: Path) -> None:
    first = index_shard(shard, cache)
    (note,) = (cache / "shards").iterdir()
    held = json.loads(note.read_text())
    held["members"] = held["members"][:2]
    note.write_text(json.dumps(held))
    assert len(index_shard(shard, cache)) == 2  # the note is what was read
    write(shard, {"only.txt": b"new"})
    assert [m.name for m in index_shard(shard, cache)] == ["only.txt"]
    assert len(first) == 6


@pytest.mark.parametrize("keep", [1, 100, 511, 512, 700, 2048, 2049, 2560, 2561, 5000])
def test_a_truncated_shard_names_itself_and_the_offset(shard: Path, keep: int) -> None:
    whole = shard.read_bytes()
    shard.write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"shard .*s-000\.tar: .*offset \d+") as caught:
        index_shard(shard, None)
    found = re.search(r"offset (\d+)", str(caught.value))
    assert found is not None and int(found[1]) <= keep


def test_every_cut_before_the_end_is_noticed(shard: Path) -> None:
    whole = shard.read_bytes()
    end = index_shard(shard, None)[-1]
    last = -(-(end.offset + end.size) // 512) * 512
    for keep in [*range(0, last, 97), last, last + 512, last + 1023]:
        shard.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="offset"):
            index_shard(shard, None)
    shard.write_bytes(whole[: last + 1024])
    assert len(index_shard(shard, None)) == 6


def test_a_corrupt_header_names_the_offset(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    third = index_shard(shard, None)[2].offset - 512
    data[third + 20] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"s-000\.tar: corrupt at offset {third}: no valid tar"):
        index_shard(shard, None)


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
