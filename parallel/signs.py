"""Signs of life: what can be told of a process and of a store without asking them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any


def location() -> str:
    """The innermost line of the main thread that is neither PyTorch's nor Python's own."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        outside = {"site-packages", "multiprocessing", "threading.py", "<frozen importlib"}
        if not outside & set(path.parts) and "lib/python" not in str(path):
            return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return ""


def host() -> str:
    """This machine, as far as process numbers mean the same."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {os.getpid()}"


def canary(store: Any) -> socket.socket | None:
    """An idle connection to the store's server, which shows that it is gone.

    A request would show it too, but c10d prints a stack trace for it.
    """
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    try:
        connection = socket.create_connection((store.host, store.port), timeout=10.0)
    except (AttributeError, OSError):  # a store without a server
        return None
    connection.setblocking(False)
    return connection


def closed(connection: socket.socket | None) -> bool:
    """Whether the other end of an idle connection is gone."""
    if connection is None:
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def fate(process: int) -> str:
    """What became of a process on this machine; empty if it lives."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "has died without a word"
    letter = text.rpartition(")")[2].split()[0]
    if letter in "ZX":
        return "has died without a word"
    return "is stopped (SIGSTOP)" if letter in "Tt" else ""
