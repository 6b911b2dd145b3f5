"""A save that is killed, that runs out of disk, or that may not write loses nothing."""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints.errors import CheckpointError
from checkpoints.store import CheckpointStore
from checkpoints.transaction import PHASES
from core.errors import UserError
from tests.checkpoints.crashes import KILLED_SEED, SITUATIONS
from tests.checkpoints.helpers import assert_same, make_state


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], int]]:
    """The folders that dying processes left, and how each of them died."""
    root = tmp_path_factory.mktemp("crashes")
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.crashes", str(root)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = (line.split() for line in done.stdout.splitlines())
    return root, {(situation, phase): int(code) for situation, phase, code in rows}


CASES = [
    (situation, phase)
    for situation in SITUATIONS
    for phase in PHASES
    if phase != "aside" or situation == "again"
]


@pytest.mark.parametrize(("situation", "phase"), CASES)
def test_killed_at_every_phase(
    crashed: tuple[Path, dict[tuple[str, str], int]], situation: str, phase: str, tmp_path: Path
) -> None:
    root, codes = crashed
    assert codes[situation, phase] == -9
    folder = tmp_path / "copy"
    shutil.copytree(root / situation / phase, folder)
    before, step = SITUATIONS[situation]
    arrived = PHASES.index(phase) >= PHASES.index("rename")
    store, state = CheckpointStore(folder, keep=2), make_state(99)
    if arrived:
        assert store.load(state).step == step
        assert_same(state, make_state(KILLED_SEED))
    elif before:
        assert store.load(state).step == before[-1]
        assert_same(state, make_state(before[-1]))
    else:
        with pytest.raises(UserError, match="no checkpoint there"):
            store.load(state)

    # The next save clears what was left and is what the next load finds.
    store.save(4, make_state(4))
    store.load(state)
    assert_same(state, make_state(4))
    assert (folder / "latest").read_text() == "step-00000004\n"
    left = {path.name for path in folder.iterdir()} - {".lock", "latest"}
    assert all(name.startswith("step-") for name in left) and len(left) <= 2
    assert all(found.verify() is None for found in store.list())


def test_killed_anywhere(crashed: tuple[Path, dict[tuple[str, str], int]]) -> None:
    folder = crashed[0] / "anywhere"
    state = make_state(1)
    loaded = CheckpointStore(folder).load(state)
    assert_same(state, make_state(loaded.step))
    assert loaded.skipped == ()


def test_the_pointer_moves_before_pruning(tmp_path: Path) -> None:
    seen: dict[str, tuple[str, int]] = {}

    def look(name: str) -> None:
        if (tmp_path / "latest").exists():
            seen[name] = ((tmp_path / "latest").read_text(), len(list(tmp_path.glob("step-*"))))

    store = CheckpointStore(tmp_path, keep=1, phase=look)
    store.save(1, make_state(1))
    store.save(2, make_state(2))
    assert seen["rename"] == ("step-00000001\n", 2)
    assert seen["pointer"] == ("step-00000002\n", 2)
    assert seen["prune"] == ("step-00000002\n", 1)


def test_every_file_is_forced_to_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        real_sync(handle)

    def rename(source: Any, target: Any) -> None:
        synced.append(f"rename to {Path(target).name}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    CheckpointStore(tmp_path).save(1, make_state(1))
    at = synced.index("rename to step-00000001")
    before = set(synced[:at])
    assert {"__0_0.distcp", ".metadata", "values.json", "manifest.json"} <= before
    assert any(name.startswith(".tmp-step-00000001") for name in before), "the folder's entries"
    assert synced[at + 1] == tmp_path.name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs more rights")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_really_full_disk(small_disk: Path, asynchronous: bool) -> None:
    import torch

    store = CheckpointStore(small_disk, keep=1)
    small, large = {"model": {"w": torch.ones(4)}}, {"model": {"w": torch.ones(200_000)}}
    store.save(1, small)
    with pytest.raises(CheckpointError, match=r"saving step 2: No space left on device; the check"):
        store.save(2, large, asynchronous=asynchronous)
        store.wait()
    assert store.load(small).step == 1
    assert not list(small_disk.glob(".tmp-*")), "the half-written one gives its space back"
    store.save(3, small)
    assert store.load(small).step == 3


@pytest.mark.parametrize("name", [".distcp", ".metadata", "values.json", "manifest.json", "latest"])
def test_no_space_at_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, make_state(1))
    real = builtins.open
    real_path = Path.open

    def full(path: Any, mode: str) -> None:
        if "w" in mode and name in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def fake_open(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        full(path, mode)
        return real(path, mode, *rest, **more)

    def fake_path_open(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        full(self, mode)
        return real_path(self, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", fake_open)
        patch.setattr(Path, "open", fake_path_open)
        with pytest.raises(CheckpointError, match=r"saving step 2: No space left on device"):
            store.save(2, make_state(2))
    state = make_state(9)
    assert store.load(state).step == (2 if name == "latest" else 1)
    store.save(3, make_state(3))
    assert [found.step for found in store.list()] == [3]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    for attempt in (store.prepare, lambda: store.save(1, make_state(1))):
        with pytest.raises(
            UserError, match=r"file/checkpoints: .*: cannot write there \(Not a dir"
        ):
            attempt()


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(os, "open", refuse)  # the superuser running the tests may write anywhere
    with pytest.raises(
        UserError, match=r"cannot write there \(Permission denied\); choose another"
    ):
        store.prepare()


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    # Record locks belong to processes, so another one has to hold it.
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
        fcntl.lockf(handle, fcntl.LOCK_EX)
        os.write(ready[1], b"x")
        os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(CheckpointError, match="another process is saving checkpoints there"):
            CheckpointStore(tmp_path).save(1, make_state(1))
    finally:
        os.write(release[1], b"x")
        os.waitpid(child, 0)
    CheckpointStore(tmp_path).save(1, make_state(1))
