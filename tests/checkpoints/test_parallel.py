"""Any topology reads any checkpoint, and ranks fail together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from checkpoints.rng import capture_rng
from checkpoints.store import CheckpointStore
from tests.checkpoints import scenarios
from tests.checkpoints.scenarios import RANKS, SCENARIOS, assert_whole, whole_state


def start(function: Callable[[int, Path], None], ranks: int, root: Path) -> None:
    """Run `function(rank, root)` in fresh processes, and leave none behind."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=function, args=(rank, root)) for rank in range(ranks)]
    for process in processes:
        process.start()
    failed = False
    for process in processes:
        process.join(1 if failed else 120)
        failed = failed or process.exitcode != 0
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    CheckpointStore(root / "alone").save(1, whole_state())
    start(scenarios.run_all, RANKS, root)
    return root


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(root: Path, name: str) -> None:
    for rank in range(RANKS):
        outcome = root / f"{name}.{rank}"
        assert outcome.exists(), f"rank {rank} did not finish"
        assert outcome.read_text() == "passed", f"rank {rank}: {outcome.read_text()}"


def test_one_process_reads_what_four_wrote(root: Path) -> None:
    state = whole_state()
    for tensor in (*state["model"].values(), state["optimizer"]["moment"]):
        tensor.zero_()
    state["optimizer"]["lr"], state["progress"] = 0.0, {}
    loaded = CheckpointStore(root / "saved_spread_loaded_otherwise").load(state)
    assert loaded.manifest.ranks == RANKS
    assert_whole(state)


def test_generators_of_another_number_of_ranks_are_left(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = capture_rng()
    before = {name: state.clone() for name, state in states.items()}
    with caplog.at_level(logging.INFO, "manyforms"):
        loaded = CheckpointStore(root / "generators_belong_to_ranks").load({"rng": states})
    assert not loaded.rng
    for name, state in states.items():
        assert torch.equal(state.view(-1), before[name].view(-1)) or state.isnan().all()
    assert "keep their fresh states: saved by 4 processes, now 1" in caplog.text


def test_a_rank_that_dies_takes_no_checkpoint_along(tmp_path: Path) -> None:
    start(scenarios.die_while_saving, 2, tmp_path)
    assert (tmp_path / "outcome").exists(), "rank 0 waits for a dead rank"
    assert "saving step 2: " in (tmp_path / "outcome").read_text()
    store = CheckpointStore(tmp_path / "run")
    weight = torch.zeros(4)
    assert store.load({"model": {"w": weight}}).step == 1
    assert weight.tolist() == [1, 1, 1, 1]
