"""Rank processes for tests: started once, then sent one function after another.

Each pool is one gloo world. A function (module-level, so that it is found by its import path) runs
on every rank of it, and may build meshes of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE = 10.0
"""Seconds that the other ranks have to finish once one has failed."""


class RankFailure(AssertionError):
    """What went wrong on which rank."""


class Ranks:
    """A pool of `size` ranks; processes start at the first `run`."""

    def __init__(self, size: int):
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Call a function on every rank and return its results in order of rank.

        Raises:
            The function's own exception, if it raised one of the same type on every rank.
            RankFailure: if only some ranks failed, or did not finish in `timeout` seconds; the pool
                is then started afresh at the next call.
        """
        if not self._processes:
            self._start()
        work = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(work)
        answers = self._collect(time.monotonic() + timeout)
        failed = {rank: answer for rank, answer in answers.items() if not answer[0]}
        if len(answers) == self.size and not failed:
            return [answers[rank][1] for rank in range(self.size)]
        kinds = {type(answer[1]) for answer in failed.values()}
        if len(failed) == self.size and len(kinds) == 1 and kinds != {RankFailure}:
            raise failed[0][1]
        self.close()
        if failed:
            rank, (_, _, text) = min(failed.items())
            raise RankFailure(f"rank {rank} of {self.size} failed:\n{text}")
        late = sorted(set(range(self.size)) - set(answers))
        raise RankFailure(f"ranks {late} of {self.size} did not finish in {timeout:.0f} seconds")

    def _collect(self, deadline: float) -> dict[int, tuple[Any, ...]]:
        answers: dict[int, tuple[Any, ...]] = {}
        while len(answers) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    code = self._processes[rank].exitcode
                    answers[rank] = (False, RankFailure(), f"the process ended (exit code {code})")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp(prefix="ranks-")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, f"{folder}/store", there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """One rank: run what comes through the pipe until it closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    with contextlib.suppress(EOFError):
        while True:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(_answer(function, args, kwargs))
    if rank == 0:
        Path(store).unlink(missing_ok=True)


def _answer(function: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    try:
        return pickle.dumps((True, function(*args, **kwargs)))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((False, error, text))
            pickle.loads(answer)  # some exceptions cannot be rebuilt
        except Exception:
            answer = pickle.dumps((False, RankFailure(text), text))
        return answer
