"""A process that dies, again and again, in the middle of saves; run by `test_transaction.py`.

usage: python -m tests.checkpoints.crashes FOLDER

For every phase of a save, in the first save of a run, in a later one, and in saving a step again,
a forked child saves and kills itself with SIGKILL as that phase ends. torch is imported once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from checkpoints.store import CheckpointStore
from checkpoints.transaction import PHASES
from tests.checkpoints.helpers import make_state

# What stands on disk before, the step whose save is killed, and the seed of its state.
SITUATIONS = {"first": ([], 1), "later": ([1, 2], 3), "again": ([1, 2], 2)}
KILLED_SEED = 50


def killed_at(phase: str, folder: Path, step: int) -> int:
    """Save `step` in a child that kills itself after `phase`; returns the child's signal."""
    child = os.fork()
    if child == 0:

        def die(name: str) -> None:
            if name == phase:
                os.kill(os.getpid(), signal.SIGKILL)

        CheckpointStore(folder, keep=2, phase=die).save(step, make_state(KILLED_SEED))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(seconds: float, folder: Path) -> None:
    """Save step after step in a child until it is killed from outside."""
    child = os.fork()
    if child == 0:
        store, step = CheckpointStore(folder, keep=2), 100
        while True:
            store.save(step, make_state(step), asynchronous=True)
            step += 1
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(root: Path) -> None:
    for situation, (before, step) in SITUATIONS.items():
        for phase in PHASES:
            if phase == "aside" and situation != "again":
                continue
            folder = root / situation / phase
            for earlier in before:
                CheckpointStore(folder, keep=2).save(earlier, make_state(earlier))
            print(situation, phase, killed_at(phase, folder, step), flush=True)
    for attempt in range(6):
        killed_after(0.03 + 0.029 * attempt, root / "anywhere")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
