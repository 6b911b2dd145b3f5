"""When a rank dies or hangs, every other rank ends with one line that says who and where.

Each rank publishes a beat and what it waits for (`parallel.inflight`) through the job's store. One
that has waited in an operation for the time-out reads what the others say, works out who is to
blame (`parallel.blame`), leaves that verdict in the store for all ranks, and ends its process: a
thread that is blocked in a collective cannot be interrupted. Two threads do this: the store of a
dead or frozen rank may block the one that talks, and must not block the one that counts.

Nothing here ends a rank that is merely slow: only a wait as long as the time-out does, and a
verdict.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from core.log import get_logger
from parallel import signs
from parallel.blame import State, Unclear, blame, tell
from parallel.inflight import Operation, Recorder

FAILED = 1
"""The exit code of a rank that ends here."""
MARGIN = 60.0
"""Seconds by which the collectives' own time-out is longer, so that this one comes first."""
_LOST = "gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe"


class PeerFailure(RuntimeError):
    """Another rank died or hung; the message is the one line that names it and the collective."""


class Watchdog:
    """Watches this rank's waits and publishes its own; see the module.

    Args:
        store: of the job; a connection of its own is made.
        timeout: seconds that a wait may take.
        hosted: the rank whose process serves the store; None: a launcher's does.
    """

    def __init__(
        self,
        store: PrefixStore,
        rank: int,
        world: int,
        timeout: float,
        recorder: Recorder,
        hosted: int | None,
    ):
        self.rank, self.world, self.timeout, self.hosted = rank, world, timeout, hosted
        # Seldom enough to cost nothing, and not to flood the store of a large job.
        self.tick = max(min(timeout / 10, 5.0), 0.25, world / 4000)
        self.silence = max(3.0, 3 * self.tick)
        """Seconds without a beat after which a rank that is waited for counts as dead."""
        self._group = dist.group.WORLD
        self._recorder = recorder
        clone: Any = store.clone  # type: ignore[attr-defined]
        self._store: PrefixStore = clone()
        self._canary = signs.canary(store)
        self._store.set_timeout(timedelta(seconds=self.silence))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._hurry = threading.Event()  # the talker is not to sleep
        self._ended = ""
        self._told = threading.Event()  # how this rank ended stands in the store
        self._speaking = threading.Lock()
        self._judging = False
        self._endings: dict[int, str] = {}  # what ranks that failed said last
        self._verdict = ""  # the first one of the job, once it is known
        self._proposal = ""
        self._asked: set[int] = set()
        self._states: dict[int, State] = {}
        self._moved: dict[int, tuple[int, float, int]] = {}  # beat, since when, how often seen new
        self._lost: float | None = None  # since when the store does not answer
        self._talking: float | None = None  # since when the talker is in a request
        self._started = time.monotonic()
        self._me = State(host=signs.host(), process=os.getpid())
        self._publish()
        self._threads = [
            threading.Thread(target=self._talk, name="watchdog-store", daemon=True),
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # What the other threads of this rank call.

    def stop(self, why: str = "has left the job") -> None:
        """End the watch; those who still wait for this rank are told why."""
        self._stop.set()
        self.tell(why)
        for thread in self._threads:
            thread.join(5.0)  # at the interpreter's end, a thread inside of c10d would abort it

    def tell(self, why: str) -> None:
        """Let the others know that this rank has ended, and why; waits a moment for the store."""
        self._ended = self._ended or " ".join(why.split())
        self._hurry.set()
        if self._lost is None:
            self._told.wait(2.0)

    def judge(self, error: BaseException) -> NoReturn:
        """End the process because a collective has failed, once it is known who is to blame."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, for the same cause
        self._judging = True
        seen = self._recorder.look()
        operation = seen.waiting[0] if seen.waiting else seen.last
        deadline = time.monotonic() + 2 * self.silence + 2.0
        while not self._verdict and time.monotonic() < deadline:
            found = self._opinion(operation) if operation is not None else None
            if isinstance(found, str):
                self._end(self._agree(found), error)
            time.sleep(0.05)
        where = f" in {operation}" if operation is not None else ""
        broken = f"the connection between the ranks broke{where}{self._when()}"
        self._end(self._verdict or broken, error)

    # The thread that talks to the store.

    def _talk(self) -> None:
        alarms = 0
        while True:
            self._hurry.clear()
            stopping = self._stop.is_set() and bool(self._ended)
            try:
                self._talking = time.monotonic()
                if signs.closed(self._canary):
                    raise ConnectionError("the store is gone")
                self._publish()
                if self._proposal and not self._verdict:
                    own = f"{self.rank} {self._proposal}"
                    held = self._store.compare_set("verdict", "", own).decode()
                    self._store.add("alarms" if held == own else "heard", 1)
                    self._verdict = held.partition(" ")[2]
                elif self._store.add("alarms", 0) > alarms:
                    alarms += 1
                    self._hear()
                self._read()
                self._lost = None
            except Exception:  # whatever a store may raise when its other end is gone
                self._lost = self._lost or time.monotonic()
            finally:
                self._talking = None
            if stopping:
                return
            pause = self.tick if not self._asked else min(self.tick, 0.25)
            self._hurry.wait(pause)

    def _hear(self) -> None:
        """A rank has failed, or a verdict was given."""
        if self._store.check(["failed"]):
            rank, _, why = self._store.get("failed").decode().partition(" ")
            self._endings[int(rank)] = why
        if self._store.check(["verdict"]):
            self._verdict = self._store.get("verdict").decode().partition(" ")[2]
        self._store.add("heard", 1)

    def _publish(self) -> None:
        seen = self._recorder.look()
        waiting = next((o for o in seen.waiting if not o.background), None)
        self._me = replace(
            self._me,
            beat=self._me.beat + 1,
            step=_step,
            at=signs.location(),
            entered=dict(seen.entered),
            waiting=waiting,
            ended=self._ended,
        )
        self._store.set(f"rank-{self.rank}", self._me.pack())
        if self._me.ended and not self._told.is_set():
            if not self._stop.is_set():
                self._store.set("failed", f"{self.rank} {self._ended}")
                self._store.add("alarms", 1)
            self._told.set()

    def _read(self) -> None:
        """Ask after the ranks that are waited for."""
        for rank in sorted(self._asked):
            key = f"rank-{rank}"
            now = time.monotonic()
            if not self._store.check([key]):
                self._moved.setdefault(rank, (0, now, 0))
                continue
            state = State.unpack(self._store.get(key))
            beat, _, seen = self._moved.get(rank, (-1, now, -1))
            if state.beat != beat:
                self._moved[rank] = (state.beat, now, seen + 1)
                self._states[rank] = state

    # The thread that counts.

    def _watch(self) -> None:
        patient: dict[tuple[str, int, str], float] = {}  # operation → seconds waited
        before = time.monotonic()
        while not self._stop.wait(min(self.tick, 1.0)):
            now = time.monotonic()
            # A job that was suspended as a whole has not waited meanwhile.
            passed, before = min(now - before, 2 * self.tick), now
            if dist.group.WORLD is not self._group:
                return  # the job is over
            self._lengthen()
            seen = self._recorder.look()
            patient = {_key(o): patient.get(_key(o), 0.0) + passed for o in seen.waiting}
            if self._verdict:
                self._end(self._verdict)
            asked = self._judging
            for operation in seen.waiting:
                waited, limit = patient[_key(operation)], self._limit(operation)
                if waited < limit / 2 and not (self._lost or self._endings):
                    continue
                asked = True
                found = self._opinion(operation)
                lost = self._lost is not None and self.hosted is not None
                hopeless = lost or bool(self._endings)
                if isinstance(found, str) and (
                    waited >= limit or (hopeless and waited > self.silence)
                ):
                    which = " (parallel.timeout)" if limit == self.timeout else ""
                    self._end(self._agree(f"{found}, for {waited:.0f} s{which}"))
                if waited >= limit + 2 * self.silence + 2.0:
                    self._end(
                        f"{operation} has not ended for {waited:.0f} s{self._when()}, and who is "
                        f"to blame cannot be told"
                    )
            if not asked:
                with self._lock:
                    self._asked.clear()
                    self._moved.clear()
                    self._states.clear()

    def _limit(self, operation: Operation) -> float:
        """Seconds that this operation may take: a group made for long waits has its own."""
        usual = max(self.timeout + MARGIN, _USUAL)
        return operation.patience if operation.patience > usual else self.timeout

    def _lengthen(self) -> None:
        """Let the groups' own time-outs come after this one, also of those made since."""
        least = timedelta(seconds=self.timeout + MARGIN)
        for group in list(dist.distributed_c10d._world.pg_map):
            for device in group._device_types:
                options = getattr(group._get_backend(device), "options", None)
                if options is not None and options._timeout < least:
                    dist.distributed_c10d._set_pg_timeout(least, group)

    def _opinion(self, operation: Operation) -> str | None:
        """Why this operation waits in vain; None while that cannot be said."""
        others = set(operation.ranks) if operation.peer is None else {operation.peer}
        with self._lock:
            self._asked |= others - {self.rank}
        silent = self._silent()
        states = {**self._states, self.rank: replace(self._me, step=_step, waiting=operation)}
        for rank, why in dict(self._endings).items():
            states[rank] = replace(states.get(rank, State()), ended=why)
        if self.hosted in silent:  # and nothing can be learnt of the others any more
            known = self._endings or {self.hosted: silent[self.hosted]}
            return tell(known, operation, _step)
        found = blame(self.rank, states, silent)
        if isinstance(found, Unclear):
            with self._lock:
                self._asked |= found.ranks
            return None
        # Only what all who were asked said since counts: two beats, or silence.
        moved = dict(self._moved)
        fresh = {rank for rank, (_, _, seen) in moved.items() if seen >= 2}
        return found if self._asked <= fresh | set(silent) else None

    def _silent(self) -> dict[int, str]:
        """Ranks that give no sign of life, and how that is known."""
        now, found = time.monotonic(), {}
        for rank, (_, since, _) in list(self._moved.items()):
            state = self._states.get(rank)
            known = (
                signs.fate(state.process)
                if state is not None and state.host == self._me.host
                else ""
            )
            if known:
                found[rank] = known
            elif now - since > self.silence and self._lost is None:
                found[rank] = f"has given no sign of life for {now - since:.0f} s"
        stuck = self._talking is not None and now - self._talking > self.silence
        if self.hosted is not None and self.hosted != self.rank and (self._lost or stuck):
            gone = "is gone: its store does not answer" if self._lost else "gives no sign of life"
            found[self.hosted] = found.get(self.hosted, gone)
        return found

    def _agree(self, line: str) -> str:
        """The verdict of the job: this one, or another rank's that came before."""
        if self.hosted in self._silent():
            return line  # there is no store to share it through
        self._proposal = self._proposal or line
        deadline = time.monotonic() + 2.0
        self._hurry.set()
        while not self._verdict and self._lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._verdict or line

    def _when(self) -> str:
        return f", step {_step}" if _step else ", before the first step"

    def linger(self) -> None:
        """Serve the store until the others have heard the verdict, or had the time to."""
        if self.hosted != self.rank or self._lost is not None:
            return
        deadline = time.monotonic() + 2 * self.tick + 1.0
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                if self._store.add("heard", 0) >= self.world - 1 - len(self._silent()):
                    return
                time.sleep(0.05)

    def _end(self, line: str, error: BaseException | None = None) -> NoReturn:
        """Say the line and end the process, also from beside a thread that is blocked."""
        while not self._speaking.acquire(blocking=False):
            time.sleep(1.0)  # another thread says it, and ends the process
        line = _say_where(line)
        _log_stacks(line, error)
        try:
            _speak(PeerFailure(line))
            flush = threading.Thread(target=sys.stdout.flush, daemon=True)
            flush.start()
            flush.join(0.5)  # its lock may be held by a thread that is blocked
            self.linger()
        finally:
            os._exit(FAILED)


_USUAL = 1800.0
"""PyTorch's time-out of a group that was given none."""
_current: Watchdog | None = None
_step = 0
_joined = 0


def _to_stderr(error: BaseException) -> None:
    """The line on standard error, in one write that needs no lock."""
    rank = os.environ.get("RANK", "0")
    who = f"[rank {rank}] " if rank != "0" else ""
    os.write(2, f"manyforms: {who}{error}\n".encode())


_speak: Callable[[PeerFailure], Any] = _to_stderr


def speak_with(speak: Callable[[PeerFailure], Any]) -> None:
    """How a rank that ends here says why; by default a line on standard error."""
    global _speak
    _speak = speak


def start(timeout: float, recorder: Recorder, hosted: int | None) -> Watchdog:
    """Watch the process group that was just joined; a collective.

    Args:
        timeout: seconds that a wait may take.
        recorder: made before the process group was.
        hosted: the rank whose process serves the store, None if a launcher's does.
    """
    global _current, _joined
    if not _joined:
        atexit.register(stop)
    _joined += 1
    store = PrefixStore(f"watchdog-{_joined}", dist.distributed_c10d._get_default_store())
    _current = Watchdog(store, dist.get_rank(), dist.get_world_size(), timeout, recorder, hosted)
    return _current


def stop() -> None:
    """End the watch, where there is one: call it before the process group is destroyed."""
    global _current
    watchdog, _current = _current, None
    if watchdog is not None:
        watchdog.stop()


def at_step(step: int) -> None:
    """The trainer's current step, from 1, for the line of a failure."""
    global _step
    _step = step


def failed(error: BaseException) -> None:
    """Call it with the error that ends this rank's part in the job.

    Of an error of this rank's own the others are told, so that they can name it. An error of a
    collective is another rank's: the process ends here, with the line that names that rank.
    """
    watchdog = _current
    if watchdog is None:
        return
    if is_lost_connection(error):
        watchdog.judge(error)
    cause = str(error).strip().partition("\n")[0]
    watchdog.tell(f"failed ({type(error).__name__}: {cause})")
    watchdog.linger()


def is_lost_connection(error: BaseException) -> bool:
    """Whether this is what collectives and stores raise when another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST)


def _key(operation: Operation) -> tuple[str, int, str]:
    return operation.group, operation.call, operation.name


def _log_files() -> list[Path]:
    handlers = get_logger().handlers
    return [Path(h.baseFilename) for h in handlers if isinstance(h, logging.FileHandler)]


def _say_where(line: str) -> str:
    files = _log_files()
    return f"{line}; the tracebacks are in {files[0]}" if files else line


def _log_stacks(line: str, error: BaseException | None) -> None:
    """The line and where every thread is, into the run's log; no lock of logging is taken."""
    rank, clock = os.environ.get("RANK", "0"), time.strftime("%H:%M:%S")
    for path in _log_files():
        with contextlib.suppress(OSError), open(path, "a", encoding="utf8") as file:
            file.write(f"{clock} [rank {rank}] {line}\n")
            if error is not None:
                file.writelines(traceback.format_exception(error))
            for ident, frame in sys._current_frames().items():
                main = " (main)" if ident == threading.main_thread().ident else ""
                file.write(f"thread {ident}{main}:\n")
                file.writelines(traceback.format_stack(frame))
