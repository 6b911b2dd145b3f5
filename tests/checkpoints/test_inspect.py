"""Listing, verifying and finding checkpoints without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.inspect import find_checkpoint, rows
from checkpoints.store import CheckpointStore
from core.errors import UserError
from tests.checkpoints.helpers import flip_byte, make_state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 10, 20 and 30, of which 30 has a flipped bit and 20 no manifest."""
    run = tmp_path_factory.mktemp("runs") / "run"
    store = CheckpointStore(run / "checkpoints")
    for step in (10, 20, 30):
        store.save(step, make_state(step))
    flip_byte(run / "checkpoints" / "step-00000030" / "__0_0.distcp")
    (run / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    return run


def test_rows(run: Path) -> None:
    listed = rows(run)
    assert [row.step for row in listed] == [10, 20, 30]
    assert [row.flaw for row in listed] == [None, "no manifest.json", None]
    folder = run / "checkpoints" / "step-00000010"
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert listed[0].size == sum(path.stat().st_size for path in files)
    assert listed[0].age is not None and 0 <= listed[0].age < 600 and listed[0].ranks == 1
    assert listed[1].size is None and listed[1].age is None

    verified = rows(run / "checkpoints", verify=True)
    assert verified[2].flaw == "__0_0.distcp is damaged: SHA-256 differs"
    assert [row.step for row in rows(folder, verify=True)] == [10]


def test_find(run: Path) -> None:
    folder = run / "checkpoints"
    for place in (run, folder):
        assert find_checkpoint(place) == folder / "step-00000030"
        assert find_checkpoint(place, 10) == folder / "step-00000010"
    assert find_checkpoint(folder / "step-00000010") == folder / "step-00000010"


@pytest.mark.parametrize(
    ("place", "step", "message"),
    [
        ("run", 12, r"no checkpoint of step 12; the nearest is step 10"),
        ("run/checkpoints/step-00000027", None, r"no such checkpoint; the nearest is step 30"),
        ("run/checkpoints/step-00000010", 20, r"is the checkpoint of step 10, not of step 20"),
        ("rum", None, r"no such folder; did you mean 'run'\?"),
        ("run/checkpoints/latest", None, r"is a file"),
        ("", None, r"no checkpoint there"),
    ],
)
def test_mistakes(run: Path, place: str, step: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_checkpoint(run.parent / place, step)


def test_nothing_whole_to_find(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(1, make_state(1))
    (tmp_path / "step-00000001" / "values.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole; step 1: values.json is missing"):
        find_checkpoint(tmp_path)


def test_torch_is_not_imported() -> None:
    code = "import sys, checkpoints.inspect, checkpoints.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
