"""Saving and loading in one process: exactness, the background, what is refused and why."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path

import pytest
import torch

from checkpoints.errors import CheckpointError
from checkpoints.rng import capture_rng
from checkpoints.store import CheckpointStore
from core.errors import UserError
from tests.checkpoints.helpers import assert_same, flip_byte, make_state


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, asynchronous: bool) -> None:
    store = CheckpointStore(tmp_path)
    store.save(7, make_state(7), extra={"config": "abc"}, asynchronous=asynchronous)
    store.wait()
    state = make_state(1)
    loaded = store.load(state)
    assert_same(state, make_state(7))
    assert (loaded.step, loaded.skipped) == (7, ())
    assert loaded.manifest.extra == {"config": "abc"}
    assert loaded.manifest.tensors["model/blocks.0.bfloat16"].dtype == "bfloat16"
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert isinstance(state["optimizer"]["groups"][0]["betas"], tuple)


def test_loading_fills_in_place(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    weight = torch.nn.Parameter(torch.ones(3))
    store.save(1, {"model": {"w": weight}, "progress": {"old": 1.5}})
    target, progress = torch.nn.Parameter(torch.zeros(3)), {"new": 2}
    store.load({"model": {"w": target}, "progress": progress})
    assert target.detach().tolist() == [1, 1, 1] and target.requires_grad
    assert progress == {"old": 1.5}


def test_values_that_text_could_lose(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": -math.inf, "d": 2**70, "e": True, "f": [1, 2.5]}
    store.save(1, {"progress": values})
    progress: dict[str, object] = {}
    store.load({"progress": progress})
    assert progress == values


def test_changes_after_an_asynchronous_save_are_not_saved(tmp_path: Path) -> None:
    go = threading.Event()
    store = CheckpointStore(tmp_path, phase=lambda name: go.wait(20) if name == "folder" else None)
    state = make_state(1)
    store.save(1, state, asynchronous=True)
    state["model"]["blocks.0.float32"].zero_()
    state["optimizer"]["groups"][0]["lr"] = -1.0
    state["progress"]["step"] = -1
    go.set()
    store.wait()
    back = make_state(2)
    store.load(back)
    assert_same(back, make_state(1))


def test_one_save_in_flight(tmp_path: Path) -> None:
    running, most = [0], [0]

    def phase(name: str) -> None:
        if name == "begin":
            running[0] += 1
            most[0] = max(most[0], running[0])
        elif name == "prune":
            running[0] -= 1

    store = CheckpointStore(tmp_path, phase=phase)
    for step in (1, 2, 3):
        store.save(step, make_state(step), asynchronous=True)
    store.wait()
    assert most == [1] and [found.step for found in store.list()] == [1, 2, 3]


@pytest.mark.parametrize("surface", ["wait", "save", "load"])
def test_a_background_failure_surfaces_once(tmp_path: Path, surface: str) -> None:
    def phase(name: str) -> None:
        if name == "tensors" and failing[0]:
            raise OSError(5, "Input/output error")

    failing = [False]
    store = CheckpointStore(tmp_path, phase=phase)
    store.save(1, make_state(1))
    failing[0] = True
    store.save(2, make_state(2), asynchronous=True)
    assert store._thread is not None
    store._thread.join()
    failing[0] = False
    with pytest.raises(CheckpointError, match=r"saving step 2: .*Input/output error"):
        if surface == "wait":
            store.wait()
        elif surface == "save":
            store.save(3, make_state(3))
        else:
            store.load(make_state(9))
    store.wait()
    store.save(3, make_state(3))
    assert [found.step for found in store.list()] == [1, 3]
    assert not list(tmp_path.glob(".tmp-*"))


def test_same_step_again_replaces(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for seed in (1, 2):
        store.save(5, make_state(seed))
    state = make_state(9)
    store.load(state)
    assert_same(state, make_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "latest", "step-00000005"]


def test_newest_is_what_was_saved_last(tmp_path: Path) -> None:
    """After a return to step 1 the abandoned step 3 is not resumed from, nor kept before 2."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 3, 2):
        store.save(step, make_state(step))
    assert store.load(make_state(9)).step == 2
    assert [found.step for found in store.list()] == [2, 3]


def test_a_chosen_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        store.save(step, make_state(step))
    state = make_state(1)
    assert store.load(state, step=10).step == 10
    assert_same(state, make_state(10))
    with pytest.raises(UserError, match="no checkpoint of step 13; the nearest is step 10"):
        store.load(state, step=13)
    flip_byte(tmp_path / "step-00000010" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"step 10: __0_0\.distcp is damaged"):
        store.load(state, step=10)
    assert store.verify(10) == "__0_0.distcp is damaged: SHA-256 differs"
    assert store.verify(20) is None


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no checkpoint there"):
        CheckpointStore(tmp_path / "nothing").load(make_state(1))


def test_only_the_sections_asked_for_are_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(3, make_state(3))
    model = make_state(1)["model"]
    store.load({"model": model})
    assert torch.equal(model["blocks.0.float32"], make_state(3)["model"]["blocks.0.float32"])
    with pytest.raises(UserError, match=r"no tensor 'ema/w'"):
        store.load({"ema": {"w": torch.zeros(1)}})


def test_names_and_shapes_must_match(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"head.weight": torch.zeros(2, 3), "bias": torch.zeros(2)}})
    both = {"head.weight": torch.ones(2, 3), "bias": torch.ones(2)}
    with pytest.raises(UserError, match=r"no tensor 'model/heads.weight'; did you mean 'model/hea"):
        store.load({"model": {"heads.weight": torch.ones(2, 3), "bias": torch.ones(2)}})
    with pytest.raises(UserError, match=r"this run has no 'model/bias', which the checkpoint has"):
        store.load({"model": {"head.weight": both["head.weight"]}})
    with pytest.raises(UserError, match=r"shape \[2, 3\] in the checkpoint and \[2, 4\] in this"):
        store.load({"model": {**both, "head.weight": torch.ones(2, 4)}})
    with pytest.raises(UserError, match=r"no value 'model/scale'"):
        store.load({"model": {**both, "scale": 1.0}})
    assert both["head.weight"].eq(1).all() and both["bias"].eq(1).all(), "a refusal changes nothing"


def test_conversion_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"w": torch.full((2,), 1.5)}})
    target = torch.zeros(2, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "manyforms"):
        store.load({"model": {"w": target}})
    assert target.tolist() == [1.5, 1.5]
    assert "saved as float32 are converted to bfloat16" in caplog.text


def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match="optimizer/hook: a function"):
        store.save(1, {"optimizer": {"hook": make_state}})
    with pytest.raises(TypeError, match="optimizer/state: the key 0 is not a string"):
        store.save(1, {"optimizer": {"state": {0: torch.zeros(1)}}})
    assert store.list() == []


def test_strided_and_scalar_tensors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    base = torch.arange(12.0).view(3, 4)
    saved = {
        "t": base.t(),
        "column": base[:, 1],
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
    }
    store.save(1, {"model": saved}, asynchronous=True)
    back = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    store.load({"model": back})
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_generators_resume(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    torch.manual_seed(3)
    store.save(1, {"rng": capture_rng()})
    expected = torch.get_rng_state()
    torch.rand(5)
    states = capture_rng()
    assert store.load({"rng": states}).rng
    assert torch.equal(states["torch"], expected)
