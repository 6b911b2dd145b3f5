"""The pipeline's schedules: how many stages a rank holds, where they stand, what they need.

The order of work is PyTorch's (`torch.distributed.pipelining.schedules`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from core.errors import UserError

if TYPE_CHECKING:
    from parallel.config import ParallelConfig


@dataclass(frozen=True)
class Schedule:
    """What distinguishes a schedule.

    torch: its name in PyTorch.
    stages: how many stages a rank holds; None: `virtual_stages`.
    layered: as many as it has layers, each of which takes all micro-batches before the next.
    v_shaped: stage i and the i-th from the end stand on one rank, else every P-th stage does.
    halves: the backward pass comes in two halves, for inputs and for weights.
    fits: whether it runs with (ranks, micro-batches).
    """

    torch: str
    stages: int | None = 1
    v_shaped: bool = False
    halves: bool = False
    layered: bool = False
    fits: Callable[[int, int], bool] = lambda ranks, micro_batches: True


def _in_rounds(ranks: int, micro_batches: int) -> bool:
    """Rounds of equal length, each of at least as many micro-batches as ranks."""
    return micro_batches % max(1, micro_batches // ranks) == 0


SCHEDULES = {
    "gpipe": Schedule("GPipe"),
    "1f1b": Schedule("1F1B", fits=lambda ranks, micro_batches: micro_batches >= ranks),
    "interleaved_1f1b": Schedule("Interleaved1F1B", stages=None, fits=_in_rounds),
    "interleaved_zero_bubble": Schedule(
        "InterleavedZeroBubble", stages=None, halves=True, fits=_in_rounds
    ),
    "zbv": Schedule("ZBVZeroBubble", stages=2, v_shaped=True, halves=True),
    "dualpipev": Schedule(
        "DualPipeV",
        stages=2,
        v_shaped=True,
        halves=True,
        fits=lambda ranks, micro_batches: micro_batches >= 2 * ranks,
    ),
    "modular": Schedule("LoopedBFS", stages=None, layered=True),
}
"""By the name in `parallel.schedule`.

GPipe: Huang et al. 2018 (1811.06965). 1F1B and interleaved: Narayanan et al. 2021 (2104.04473).
Zero bubble, and its V-shaped form: Qi et al. 2024 (2401.10241). DualPipeV: after DeepSeek-AI 2024
(2412.19437). Modular: Lamy-Poirier 2021 (2106.02679).
"""


def stage_ranks(config: ParallelConfig, stages: int | None = None) -> list[int]:
    """The pipeline rank of every stage.

    Args:
        stages: how many a rank holds, where the schedule leaves it open, instead of
            `virtual_stages`.
    """
    schedule, ranks = SCHEDULES[config.schedule], config.pp
    each = schedule.stages or stages or config.virtual_stages
    if schedule.v_shaped:
        return [*range(ranks), *reversed(range(ranks))]
    return [stage % ranks for stage in range(each * ranks)]


def check_micro_batches(
    config: ParallelConfig, micro_batches: int, samples: int | None = None
) -> None:
    """Whether a step of so many micro-batches can be scheduled.

    Args:
        samples: of a rank in a step, for a better proposal.

    Raises:
        UserError: naming the smallest number above that can.
    """
    schedule = SCHEDULES[config.schedule]
    if config.pp == 1 or schedule.fits(config.pp, micro_batches):
        return
    works = next(n for n in count(micro_batches) if schedule.fits(config.pp, n))
    proposal = "lower train.micro_batch or raise train.global_batch"
    if samples is not None:
        proposal = "raise train.global_batch"
        for number in range(micro_batches, samples + 1):
            if samples % number == 0 and schedule.fits(config.pp, number):
                proposal = f"use train.micro_batch={samples // number}"
                break
    raise UserError(
        f"parallel.schedule: {config.schedule} on {config.pp} pipeline ranks cannot run a step of "
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}; it can of {works}: "
        f"{proposal}"
    )


def check_halves(config: ParallelConfig, *, recompute: str, compile: bool) -> None:
    """Whether the backward pass may come in halves, where the schedule has it so.

    Raises:
        UserError: naming what stands against it.
    """
    if config.pp == 1 or not SCHEDULES[config.schedule].halves:
        return
    name = f"parallel.schedule: {config.schedule} runs the backward pass in two halves"
    if compile:
        raise UserError(
            f"{name}, which compiled blocks cannot; use train.compile=false, or "
            "parallel.schedule=interleaved_1f1b"
        )
    if recompute == "selective":
        raise UserError(
            f"{name}, of which selective recomputation serves one; use train.recompute=block, or "
            "parallel.schedule=interleaved_1f1b"
        )
