"""Workers are started, told of signals, and how they end comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import UserError
from parallel.launch import GRACE, WorkerError, launch_local
from parallel.watchdog import PeerFailure
from tests.parallel import victims, workers


def test_workers_join_one_job(tmp_path: Path) -> None:
    assert launch_local(2, workers.add_up, str(tmp_path), {"fsdp": 2}) == 75
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3.0 True 1"] * 2


def test_a_mistake_comes_back_as_it_was() -> None:
    with pytest.raises(UserError) as caught:
        launch_local(2, workers.mistake)
    assert str(caught.value) == "model.dim: must be a number"
    assert "on rank 1" in caught.value.__notes__[0]


def test_a_layout_that_does_not_fit_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 4 processes, but there are 2"):
        launch_local(2, workers.add_up, str(tmp_path), {"tp": 4, "fsdp": 1})


def test_a_death_is_reported() -> None:
    with pytest.raises(WorkerError, match=r"rank 1 ended without a word, by signal SIGKILL"):
        launch_local(2, workers.killed)


def test_a_death_in_training_names_the_collective(tmp_path: Path) -> None:
    said = (
        r"^rank 1 ended by signal SIGKILL \(the machine may have run out of memory\); "
        r"the others waited in all_reduce over all ranks .*step 6"
    )
    with pytest.raises(PeerFailure, match=said):
        launch_local(2, victims.train, str(tmp_path), 1, "killed")


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_ended(tmp_path: Path) -> None:
    with pytest.raises(PeerFailure, match=r"^rank 1 is stopped \(SIGSTOP\); the others waited"):
        launch_local(2, victims.train, str(tmp_path), 1, "stopped")
    since = float((tmp_path / "when").read_text())
    assert time.time() - since < victims.TIMEOUT + GRACE + 8.0


def test_signals_are_passed_on(tmp_path: Path) -> None:
    def tell() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert launch_local(2, workers.stops_when_told, str(tmp_path)) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    text = (
        "from parallel.launch import launch_local\n"
        "from tests.parallel import workers\n"
        f"launch_local(2, workers.told_after_its_parent, {str(tmp_path)!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", text], cwd=Path(__file__).parents[2])
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: len(list(tmp_path.glob("stopped-*"))) == 2)
    numbers = [int(path.name.split("-")[2]) for path in tmp_path.glob("stopped-*")]
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in numbers))


def wait_for(happened: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
