"""What `test_launch.py` has worker processes do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError
from parallel.config import ParallelConfig
from parallel.start import join


def add_up(folder: str, options: dict[str, Any]) -> int:
    """Every rank adds its number in; rank 1 ends with the code of a stopped run."""
    engine = join(ParallelConfig(**options))
    total = float(engine.total(torch.tensor(float(engine.data_rank + 1))))
    text = f"{total} {engine.any(engine.layout.rank == 1)} {os.environ['OMP_NUM_THREADS']}"
    (Path(folder) / str(engine.layout.rank)).write_text(text)
    engine.close()
    return 75 if engine.layout.rank == 1 else 0


def mistake() -> None:
    """One rank finds the user's mistake, the other waits for it."""
    if os.environ["RANK"] == "1":
        raise UserError("model.dim: must be a number")
    time.sleep(60)


def killed() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stops_when_told(folder: str) -> int:
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    (Path(folder) / os.environ["RANK"]).touch()
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.02)
    return 75 if received else 1


def told_after_its_parent(folder: str) -> int:
    """Writes down its process, then that it was told to stop."""
    code = stops_when_told(folder)
    (Path(folder) / f"stopped-{os.environ['RANK']}-{os.getpid()}").touch()
    return code


def one_after_another(rank_that_fails: int) -> str:
    """For the pool: one rank raises, the others wait for it in a collective."""
    import torch.distributed as dist

    if dist.get_rank() == rank_that_fails:
        raise ValueError("this one")
    dist.barrier()
    return "done"


def all_mistaken() -> None:
    raise UserError("all of us")


def rank_and_sum() -> tuple[int, float]:
    import torch.distributed as dist

    value = torch.ones(1)
    dist.all_reduce(value)
    return dist.get_rank(), float(value)
