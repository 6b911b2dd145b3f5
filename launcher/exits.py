"""How every command ends: the one place that turns errors into a line and an exit code.

0 done; 1 the run failed; 2 the user's mistake; 75 stopped by a signal after saving, which
schedulers are told to requeue on. A traceback goes into the run's log and never to the terminal,
unless the mistake is ours.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from core.errors import UserError
from core.log import get_logger

OK = 0
FAILED = 1
MISTAKE = 2
INTERRUPTED = 130
"""A second Ctrl-C, which does not wait for a save; the shell's code for it."""
_FAILURES = {"RunFailure", "CheckpointError", "WorkerError", "PeerFailure"}


def ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line for an error; None for one that nobody expected."""
    if isinstance(error, UserError):
        return MISTAKE, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; what was saved before is untouched"
    if isinstance(error, BrokenPipeError):
        return OK, ""
    # By name: importing the rooms that define them would make every command wait for them.
    if {kind.__name__ for kind in type(error).__mro__} & _FAILURES:
        return FAILED, str(error)
    return None


def say(line: str) -> None:
    """One line on standard error, whatever line breaks the message has."""
    rank = os.environ.get("RANK", "0")
    who = f"[rank {rank}] " if rank != "0" else ""
    print(f"manyforms: {who}{' '.join(line.split())}", file=sys.stderr, flush=True)


def guard(command: Callable[[], int | None]) -> int:
    """Run a command; its exit code, after saying why on one line if it is not 0."""
    try:
        return command() or OK
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    except BaseException as error:
        expected = ending(error)
        if expected is None:
            _unexpected(error)
            return FAILED
        code, line = expected
        _log(error)
        if line:
            say(line)
        return code


def _log(error: BaseException) -> None:
    """The traceback into the run's log file, where there is one."""
    record = logging.LogRecord("manyforms", logging.ERROR, __file__, 0, "%s", (error,), None)
    record.exc_info = (type(error), error, error.__traceback__)
    for handler in get_logger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _unexpected(error: BaseException) -> None:
    """An error of ours: one line, and the traceback in the log or else behind the line."""
    _log(error)
    logged = [h for h in get_logger().handlers if isinstance(h, logging.FileHandler)]
    say(f"{type(error).__name__}: {error or 'no message'}")
    if logged:
        say(f"this is a bug; the traceback is in {logged[0].baseFilename}")
    else:
        import traceback

        traceback.print_exception(error)
