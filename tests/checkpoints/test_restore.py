"""Damage of every kind is passed over, and the reason is told."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import tensors
from checkpoints.errors import CheckpointError
from checkpoints.manifest import Manifest, record_files
from checkpoints.store import CheckpointStore
from tests.checkpoints.helpers import assert_same, flip_byte, make_state


def truncate(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 7'))


def newer_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "__0_0.distcp has .* bytes instead of"),
    "flipped tensor": (lambda f: flip_byte(f / "__0_0.distcp"), "__0_0.distcp is damaged: SHA-256"),
    "flipped index": (lambda f: flip_byte(f / ".metadata"), ".metadata is damaged: SHA-256"),
    "flipped value": (lambda f: flip_byte(f / "values.json"), "values.json is damaged: SHA-256"),
    "no shard": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "edited manifest": (edit_manifest, "its digest does not match"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "not a manifest"),
    "other manifest": (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest"),
    "newer format": (newer_format, "its format is 99 and this version reads up to 1; update"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_passed_over(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    damage, reason = DAMAGE[kind]
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, make_state(step))
    damage(tmp_path / "step-00000002")
    state = make_state(9)
    with caplog.at_level(logging.WARNING, "manyforms"):
        loaded = store.load(state)
    assert_same(state, make_state(1))
    assert loaded.step == 1 and [item.step for item in loaded.skipped] == [2]
    assert re.search(reason, loaded.skipped[0].reason), loaded.skipped
    assert f"checkpoint of step 2 skipped: {loaded.skipped[0].reason}" in caplog.text


def test_nothing_whole(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, make_state(step))
        truncate(tmp_path / f"step-0000000{step}")
    with pytest.raises(CheckpointError, match=r"no checkpoint verifies \(step 2: .*; step 1: "):
        store.load(make_state(9))


def test_a_pickle_in_the_index_does_not_run(tmp_path: Path) -> None:
    """An index with a payload, correctly sealed as an attacker would, is refused unread."""

    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return (Path.touch, (str(tmp_path / "ran"),))  # type: ignore[return-value]

    store = CheckpointStore(tmp_path)
    store.save(1, make_state(1))
    folder = tmp_path / "step-00000001"
    (folder / tensors.INDEX).write_bytes(pickle.dumps(Payload()))
    manifest = store.list()[0].manifest
    assert isinstance(manifest, Manifest)
    records = {**manifest.files, **record_files(folder, [tensors.INDEX])}
    sealed = manifest.model_copy(update={"files": records})
    (folder / "manifest.json").write_text(sealed.write_text())
    assert store.verify(1) is None
    with pytest.raises(CheckpointError, match="which no index needs"):
        store.load(make_state(1))
    assert not (tmp_path / "ran").exists()
