import json
import multiprocessing
import time
from pathlib import Path

import pytest

from core.errors import UserError
from data_pipeline.cache import MANIFEST, cached, default_cache, key


def build_counted(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(200)))
    (folder / "b.txt").write_text("text")


class Counted:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        build_counted(folder)


def test_is_built_once(tmp_path: Path) -> None:
    build = Counted()
    for _ in range(3):
        folder = cached(tmp_path / "c" / "entry", build)
    assert build.times == 1
    assert (folder / "b.txt").read_text() == "text"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["entry", "entry.lock"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: (e / "a.bin").write_bytes(bytes(199)),
        lambda e: flip(e / "a.bin"),
        lambda e: (e / "b.txt").unlink(),
        lambda e: (e / MANIFEST).unlink(),
        lambda e: (e / MANIFEST).write_text("{"),
        lambda e: (e / MANIFEST).write_text('["a"]'),
    ],
    ids=["truncated", "flipped bit", "missing file", "no manifest", "half manifest", "other json"],
)
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: object) -> None:
    build = Counted()
    entry = cached(tmp_path / "entry", build)
    assert callable(damage)
    damage(entry)
    cached(entry, build)
    assert build.times == 2
    assert (entry / "a.bin").read_bytes() == bytes(range(200))
    cached(entry, build)
    assert build.times == 2


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise UserError("the data is bad")

    with pytest.raises(UserError, match="the data is bad"):
        cached(tmp_path / "entry", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["entry.lock"]


def test_an_entry_of_a_killed_build_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "a.bin").write_bytes(b"half")  # no manifest
    build = Counted()
    cached(tmp_path / "entry", build)
    assert build.times == 1


def build_slowly(folder: Path) -> None:
    time.sleep(0.3)
    build_counted(folder)
    log = folder.parent / "builds.log"
    with open(log, "a") as file:
        file.write("built\n")


def test_processes_wait_for_one_builder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=cached, args=(tmp_path / "entry", build_slowly)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "builds.log").read_text() == "built\n"
    assert set(json.loads((tmp_path / "entry" / MANIFEST).read_text())) == {"a.bin", "b.txt"}


def test_large_files_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.cache._WHOLE", 64)
    monkeypatch.setattr("data_pipeline.cache._BLOCK", 16)
    build = Counted()
    entry = cached(tmp_path / "entry", build)
    flip(entry / "a.bin")
    cached(entry, build)
    assert build.times == 2


def test_an_unwritable_cache_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cache .*file/entry: cannot be written"):
        cached(tmp_path / "file" / "entry", build_counted)


def test_keys_and_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key("a", 1) != key("a", "1") and key("ab", "c") != key("a", "bc")
    monkeypatch.setenv("MANYFORMS_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("MANYFORMS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/else")
    assert default_cache() == Path("/else/manyforms")
