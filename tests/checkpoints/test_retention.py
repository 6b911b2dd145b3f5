"""What a save prunes, and what it never does."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.found import Found
from checkpoints.retention import prunable
from checkpoints.store import CheckpointStore
from tests.checkpoints.helpers import make_state


def found(step: int, whole: bool) -> Found:
    item = Found(step, Path("nowhere"))
    item.flaw = None if whole else "damaged"
    return item


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 4), st.integers(0, 3))
def test_rules(whole: list[bool], keep: int, keep_every: int) -> None:
    newest_first = [
        found(step, ok) for step, ok in zip(range(len(whole), 0, -1), whole, strict=True)
    ]
    gone = {item.step for item in prunable(newest_first, keep, keep_every)}
    good = [item.step for item in newest_first if item.flaw is None]
    if keep == 0:
        assert not gone
    assert not gone & set(good[:keep]), "the newest good ones stay"
    milestones = {step for step in good if keep_every and step % keep_every == 0}
    assert not gone & milestones
    if keep:
        assert gone >= set(good[keep:]) - milestones, "and older good ones go"
    if len(good) < max(keep, 1):
        assert not gone, "damaged ones never count"


def test_newest_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        store.save(step, make_state(1))
    assert [item.step for item in store.list()] == [4, 6, 7]


def test_keep_all(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=0)
    for step in range(1, 6):
        store.save(step, make_state(1))
    assert len(store.list()) == 5


@pytest.mark.parametrize("damage", ["manifest.json", "__0_0.distcp"])
def test_the_last_good_one_is_never_pruned(tmp_path: Path, damage: str) -> None:
    """Two damaged newer ones do not push out the older whole one."""
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, make_state(1))
    for step in (2, 3):
        store.save(step, make_state(1))
        (tmp_path / f"step-0000000{step}" / damage).unlink()
    assert [item.step for item in store.list()] == [1, 2, 3]
    store.save(4, make_state(1))
    assert [item.step for item in store.list() if item.flaw is None] == [1, 4]
