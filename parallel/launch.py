"""Local worker processes, started by torch's elastic launcher.

How a worker ends is carried back as it was: its exit code, or its exception. When several workers
fail, the first to do so is the cause; the others fail because it is gone. Those that do not end by
themselves after a failure, frozen ones for example, are killed.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from parallel import watchdog

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""The signals that workers are sent when the starting process gets them."""


GRACE = 5.0
"""Seconds that the workers have to end by themselves once one has failed."""


class WorkerError(RuntimeError):
    """A worker failed with something that cannot be raised here, or without a word."""


def launch_local(nproc: int, function: Callable[..., int | None], *args: Any) -> int:
    """Run `function(*args)` in `nproc` processes of this machine, as torchrun would.

    Inside, RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous are set, so `parallel.start.join` joins.
    Signals are passed on to the workers, and their end is waited for.

    Args:
        function: module-level, so that workers find it; returns an exit code, None for 0.

    Returns:
        The largest exit code of the workers.

    Raises:
        The exception of the first worker that failed; its traceback is among the notes.
        WorkerError: if a worker ended without saying why, for example for lack of memory.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What they would log is the traceback of their own wrapper around a worker's error.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with (
        tempfile.TemporaryDirectory(prefix="manyforms-") as folder,
        _threads(nproc),
        _workers() as workers,
        _passing_signals_on(workers) as received,
        _ending_all(Path(folder), workers),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            # Workers are forked from a process that may have imported what they need already.
            start_method="forkserver",
            signals_to_handle="SIGQUIT",  # the others are passed on
        )
        try:
            codes = elastic_launch(config, _work)(
                os.getpid(), folder, dict(os.environ), function, args
            )
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            first, _ = error.get_first_failure()
            raise _cause(Path(folder), first, codes, received) from None
        return max(code or 0 for code in codes.values())


@contextlib.contextmanager
def _threads(nproc: int) -> Iterator[None]:
    """Share the machine's cores out between the workers, unless the user has."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ[name] = str(max(1, (cores or 1) // nproc))
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _workers() -> Iterator[Callable[[int], None]]:
    """Yields what sends a signal to the processes started since."""
    others = {child.pid for child in multiprocessing.active_children()}

    def send(number: int) -> None:
        for worker in multiprocessing.active_children():
            if worker.pid is not None and worker.pid not in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    yield send


@contextlib.contextmanager
def _ending_all(folder: Path, send: Callable[[int], None]) -> Iterator[None]:
    """Once a worker has said why it failed, kill those that are still there a while later.

    The elastic launcher asks them to end, but waits long for one that is stopped.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if any(folder.glob("*.error")):
                if not over.wait(GRACE):
                    send(signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def _passing_signals_on(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Send signals to the workers instead of ending here; yields those that came."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        send(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    former = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _work(
    parent: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., int | None],
    args: tuple[Any, ...],
) -> int:
    """In a worker: the function's exit code; an exception is left in the folder."""
    _take(environment)
    done = threading.Event()
    threading.Thread(target=_mind_the_parent, args=(parent, done), daemon=True).start()
    rank = os.environ["RANK"]
    watchdog.speak_with(lambda error: _leave(folder, rank, error))
    try:
        return function(*args) or 0
    except SystemExit as stop:
        if isinstance(stop.code, int | None):
            return stop.code or 0
        _leave(folder, rank, RuntimeError(stop.code))
    except BaseException as error:
        watchdog.failed(error)
        _leave(folder, rank, error)
    finally:
        done.set()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # at once: threads may wait for ranks that wait for this one


def _mind_the_parent(parent: int, done: threading.Event) -> None:
    """Do not outlive the starting process: stop as at a scheduler's signal, then end.

    A killed `manyforms train` would leave workers behind, training, or waiting for its leave to
    end. They are the fork server's children, so nobody else tells them.
    """
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(parent, 0)
            time.sleep(1.0)
    if not done.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
        done.wait()
    os._exit(1)


def _take(environment: dict[str, str]) -> None:
    """Be as a child of the starting process is: its environment as it is now, its signals."""
    own = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
    for name in set(os.environ) - set(environment):
        if not name.startswith(own):
            del os.environ[name]
    os.environ.update({k: v for k, v in environment.items() if not k.startswith(own)})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the fork server ignores
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # read at import, which is over


def _leave(folder: str, rank: str, error: BaseException) -> None:
    """Write down an exception for the starting process."""
    when, text = time.time(), "".join(traceback.format_exception(error))
    try:
        body = pickle.dumps((when, error, text))
        pickle.loads(body)  # some exceptions cannot be rebuilt
    except Exception:
        body = pickle.dumps((when, WorkerError(f"{type(error).__name__}: {error}"), text))
    part = Path(folder) / f"{rank}.part"
    part.write_bytes(body)
    part.rename(part.with_suffix(".error"))


def _cause(folder: Path, first: int, codes: dict[int, int], received: list[int]) -> BaseException:
    """What ended the run: the earliest exception, the user's signal, or a silent death.

    Args:
        first: the rank that failed first.
        codes: the exit codes of all that failed; below 0: by that signal.
    """
    code = codes[first]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    why = " (the machine may have run out of memory)" if code == -signal.SIGKILL else ""
    left = [(*pickle.loads(path.read_bytes()), path.stem) for path in folder.glob("*.error")]
    if left:
        _, error, text, who = min(left, key=lambda row: row[0])
        # The others see that a rank is gone; how it went is known here.
        seen, separator, rest = str(error).partition("; ")
        if isinstance(error, watchdog.PeerFailure) and code < 0 and f"rank {first} " in seen:
            error = watchdog.PeerFailure(f"rank {first} ended by {how}{why}{separator}{rest}")
        error.add_note(f"on rank {who}:\n{text}")
        caught: BaseException = error
        return caught
    if signal.SIGINT in received:
        return KeyboardInterrupt()
    if received:
        return SystemExit(128 + received[0])
    return WorkerError(f"rank {first} ended without a word, by {how}{why}")
