"""What `test_watchdog.py` has rank processes do: collectives, until one of them goes wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import watchdog
from parallel.config import ParallelConfig
from parallel.start import join

FAULTY_STEP = 5
TIMEOUT = 3.0


def run(rank: int, world: int, port: int, folder: str, victim: int, fault: str) -> None:
    """One rank of a job whose ranks were started by hand, as srun does it."""
    error = os.open(str(Path(folder) / f"error-{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(error, 2)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    train(folder, victim, fault)


def train(folder: str, victim: int, fault: str) -> None:
    """Steps without end, in a job that this process is to join."""
    engine = join(ParallelConfig(timeout=TIMEOUT, backend="gloo"))
    rank, world = engine.layout.rank, engine.layout.world
    try:
        for step in range(1, 10**6):
            watchdog.at_step(step)
            engine.total(torch.ones(8, 4))
            if rank == victim and step == FAULTY_STEP:
                (Path(folder) / "when").write_text(repr(time.time()))
                commit(fault)
            if fault == "sends nothing":
                pass_on(rank, world)
    except Exception as failure:
        watchdog.failed(failure)
        os._exit(3)
    os._exit(0)


def pass_on(rank: int, world: int) -> None:
    """A pipeline's way: from each rank to the next."""
    value = torch.ones(4)
    if rank:
        dist.recv(value, rank - 1)
    if rank < world - 1:
        dist.send(value, rank + 1)


def commit(fault: str) -> None:
    """Go wrong, in one of the ways that ranks do."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "loops":
        while True:
            pass
    elif fault == "raises":
        raise ValueError("bad luck")
    elif fault == "slow":  # nearly as long as the time-out
        time.sleep(2.0)
    else:
        time.sleep(60)


if __name__ == "__main__":  # under torchrun
    train(sys.argv[1], int(sys.argv[2]), sys.argv[3])
