"""Real ranks, of which one dies or hangs: the others end in time, with one line that names it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.parallel import victims
from tests.parallel.victims import TIMEOUT

SLACK = 8.0
"""Seconds more for ranks that share a busy machine; alone, they need one or two."""
Job = Callable[[int, int, str], list[BaseProcess]]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Starts the ranks of a job and returns when the victim has committed its fault."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.victims"])
    started: list[BaseProcess] = []

    def start(world: int, victim: int, fault: str) -> list[BaseProcess]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(world):
            args = (rank, world, port, str(tmp_path), victim, fault)
            started.append(context.Process(target=victims.run, args=args))
            started[-1].start()
        deadline = time.monotonic() + 120
        while not (tmp_path / "when").exists():
            failed = [process.exitcode for process in started if process.exitcode is not None]
            assert not failed and time.monotonic() < deadline, said(tmp_path, world)
            time.sleep(0.05)
        return started

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()


def said(folder: Path, world: int) -> list[str]:
    """What each rank wrote to standard error."""
    files = [folder / f"error-{rank}" for rank in range(world)]
    return [file.read_text() if file.exists() else "" for file in files]


def ends(ranks: list[BaseProcess], but: int | None, folder: Path) -> list[str]:
    """Asserts that all but one end in time, with code 1 and one line; the lines."""
    since = time.time()
    for rank, process in enumerate(ranks):
        if rank != but:
            process.join(max(0.1, since + TIMEOUT + SLACK - time.time()))
            assert process.exitcode == 1, (rank, process.exitcode, said(folder, len(ranks)))
    lines = [text for rank, text in enumerate(said(folder, len(ranks))) if rank != but]
    for line in lines:
        assert line.startswith("manyforms: ") and line.count("\n") == 1, line
        assert "all_reduce over all ranks (float32 8×4, 128 bytes, call" in line, line
        assert f"step {victims.FAULTY_STEP + 1}" in line, line
    return lines


CASES = [
    (3, 1, "killed", "rank 1 has died without a word; the others"),
    (3, 0, "killed", "rank 0 is gone: its store does not answer; the others"),
    (2, 1, "stopped", "rank 1 is stopped (SIGSTOP); the others"),
    (2, 0, "sleeps", "rank 0 has not come to the collective: it is at parallel/victims.py:"),
    pytest.param(2, 0, "stopped", "rank 0 gives no sign of life; the others",
                 marks=pytest.mark.slow),
    pytest.param(2, 1, "loops", "rank 1 has not come to the collective: it is at",
                 marks=pytest.mark.slow),
    pytest.param(3, 0, "raises", "rank 0 failed (ValueError: bad luck); the others",
                 marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("world", "victim", "fault", "line"), CASES)
def test_the_others_say_who(
    job: Job,
    tmp_path: Path,
    world: int,
    victim: int,
    fault: str,
    line: str,
) -> None:
    """One that merely hangs in Python is ended as well."""
    ranks = job(world, victim, fault)
    for told in ends(ranks, None if fault in ("sleeps", "loops") else victim, tmp_path):
        assert line in told


def test_a_slow_rank_is_waited_for(job: Job, tmp_path: Path) -> None:
    """One that is late, but less than the time-out; all go on."""
    ranks = job(2, 1, "slow")
    time.sleep(TIMEOUT)
    assert [process.exitcode for process in ranks] == [None, None], said(tmp_path, 2)


@pytest.mark.slow
def test_a_send_that_never_comes(job: Job, tmp_path: Path) -> None:
    """Rank 1 receives from rank 0, which sleeps before it sends; rank 2 receives from rank 1."""
    ranks = job(3, 0, "sends nothing")
    for process in ranks[1:]:
        process.join(TIMEOUT + SLACK)
        assert process.exitcode == 1
    for line in said(tmp_path, 3)[1:]:
        assert "rank 0 has not come" in line and line.count("\n") == 1
        assert "recv with rank 0 over all ranks (float32 4, 16 bytes), step 5" in line


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    """Its launcher serves the store, and tells the others to end as soon as one has."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.parallel.victims", str(tmp_path), "0", "killed"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("manyforms: ")]
    assert len(told) == 1, done.stderr
    assert told[0].startswith("manyforms: [rank 1] rank 0 has died without a word; the others")
