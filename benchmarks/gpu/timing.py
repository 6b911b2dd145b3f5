"""How long a function takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(work: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    """The median over the rounds, each waited for; two more warm up."""
    times = []
    for _ in range(rounds + 2):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
