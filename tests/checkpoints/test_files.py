"""Names, leftovers and the lock of a checkpoints folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import files


@given(st.integers(0, 10**10))
def test_names_come_back(step: int) -> None:
    assert files.parse_step(files.step_name(step)) == step


@pytest.mark.parametrize("name", ["step-12", ".tmp-step-00000012", "step-00000012.bak", "latest"])
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert files.parse_step(name) is None


def test_a_step_put_aside_counts_until_its_replacement_arrives(tmp_path: Path) -> None:
    (tmp_path / ".old-step-00000002").mkdir()
    (tmp_path / "step-00000001").mkdir()
    assert files.step_folders(tmp_path)[2] == tmp_path / ".old-step-00000002"
    (tmp_path / "step-00000002").mkdir()
    assert files.step_folders(tmp_path)[2] == tmp_path / "step-00000002"
    assert list(files.step_folders(tmp_path)) == [1, 2]


def test_leftovers(tmp_path: Path) -> None:
    for name in (".tmp-young", ".tmp-old", ".old-step-00000001", ".old-step-00000002"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / ".tmp-latest").write_text("")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / ".tmp-old", (long_ago, long_ago))

    # Without a lock, what is young may belong to a process that lives.
    files.clear_leftovers(tmp_path, locked=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".tmp-young", ".tmp-latest", "step-00000001", "step-00000002"}
    files.clear_leftovers(tmp_path, locked=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000001", "step-00000002"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with files.lock(tmp_path) as held:
        assert held
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with files.lock(tmp_path) as held:
        assert not held
