"""A head start for workers: while the command checks the config, they import what they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import forkserver


def start_ahead(nproc: int | None) -> None:
    """Start the process from which workers are forked, if there will be several.

    It imports the launcher's heavy modules on another core in the meantime, so that workers start
    with them loaded. Workers are started from it by `parallel.launch`, with or without this.
    """
    if nproc is not None and nproc > 1 and "RANK" not in os.environ:
        multiprocessing.set_forkserver_preload(["launcher.job"])
        # A Ctrl-C is this process's to answer; the other would print a traceback amid its imports.
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, former)
