import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from core.errors import UserError
from data_pipeline.sources.index import index_shard


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
