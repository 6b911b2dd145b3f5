"""How long a pipeline stands idle: each schedule's order of work, played through event by event.

A forward pass takes one unit of time on every stage, the backward pass two, one for the inputs and
one for the weights; messages take none. The order is the one that a run follows, PyTorch's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining.schedules import get_schedule_class

from parallel.config import ParallelConfig
from parallel.schedules import SCHEDULES, check_micro_batches, stage_ranks

COST = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
"""Forward, backward for inputs, for weights, for both."""


@dataclass(frozen=True)
class Task:
    """What a rank does at a time, on one stage and one micro-batch. `kind`: of `COST`."""

    kind: str
    stage: int
    micro_batch: int


def order(
    config: ParallelConfig, micro_batches: int, stages: int | None = None
) -> list[list[Task]]:
    """What every pipeline rank does in a step, one thing after another.

    Args:
        stages: how many stages a rank holds, where the schedule leaves it open.

    Raises:
        UserError: if the schedule cannot run so many micro-batches.
    """
    check_micro_batches(config, micro_batches)
    known, ranks = SCHEDULES[config.schedule], stage_ranks(config, stages)
    own = [
        SimpleNamespace(
            submod=None,
            stage_index=index,
            num_stages=len(ranks),
            group_size=config.pp,
            group_rank=0,
            is_first=index == 0,
            is_last=index == len(ranks) - 1,
        )
        for index, rank in enumerate(ranks)
        if rank == 0
    ]
    kind: Any = get_schedule_class(known.torch)
    if config.schedule == "1f1b":  # PyTorch draws it otherwise than it runs it
        return [_one_by_one(rank, config.pp, micro_batches) for rank in range(config.pp)]
    made = kind(own[0] if known.stages == 1 else own, micro_batches)
    return [_tasks(made.pipeline_order[rank]) for rank in range(config.pp)]


def _one_by_one(rank: int, ranks: int, micro_batches: int) -> list[Task]:
    """1F1B: as many forward passes as ranks are left, then one after each backward pass."""
    ahead = min(micro_batches, ranks - rank)
    tasks = [Task("F", rank, number) for number in range(ahead)]
    for number in range(micro_batches):
        tasks.append(Task("B", rank, number))
        if ahead + number < micro_batches:
            tasks.append(Task("F", rank, ahead + number))
    return tasks


def _tasks(actions: list[Any]) -> list[Task]:
    """PyTorch's actions that compute; those that overlap one with another, one after another."""
    single = [part for action in actions if action for part in (action.sub_actions or (action,))]
    return [
        Task(action.computation_type.value, action.stage_index, action.microbatch_index)
        for action in single
        if action.computation_type.value in COST
    ]


def finish_times(orders: list[list[Task]], stages: int) -> dict[Task, float]:
    """When each task of a step is done, if each rank does the next as soon as it can."""
    done: dict[Task, float] = {}
    free = [0.0] * len(orders)
    waiting = [deque(tasks) for tasks in orders]
    while any(waiting):
        moved = False
        for rank, tasks in enumerate(waiting):
            while tasks:
                ready = _ready(tasks[0], done, stages)
                if ready is None:
                    break
                task = tasks.popleft()
                free[rank] = done[task] = max(free[rank], ready) + COST[task.kind]
                moved = True
        assert moved, "a schedule whose ranks wait for each other"
    return done


def _ready(task: Task, done: dict[Task, float], stages: int) -> float | None:
    """When what a task needs is there; None: it is not known yet."""

    def at(kinds: str, stage: int) -> float | None:
        found = (done.get(Task(kind, stage, task.micro_batch)) for kind in kinds)
        return next((time for time in found if time is not None), None)

    if task.kind == "W":
        return at("I", task.stage)
    if task.kind == "F":
        return at("F", task.stage - 1) if task.stage else 0.0
    own = at("F", task.stage)
    after = at("IB", task.stage + 1) if task.stage < stages - 1 else 0.0
    return None if own is None or after is None else max(own, after)


def bubble(schedule: str, stages: int, virtual: int, micro_batches: int) -> float:
    """The time that a rank is idle in a step, as a share of the time that it computes.

    Args:
        schedule: a name that `parallel.schedule` takes.
        stages: pipeline ranks.
        virtual: stages on each of them; counts for the schedules that leave it open.

    Raises:
        UserError: if the schedule cannot run so many micro-batches.
    """
    if stages == 1:
        return 0.0
    # The fields are set as they are: a plan may ask for what no config would.
    asked: Any = {"pp": stages, "schedule": schedule, "virtual_stages": virtual}
    config = ParallelConfig.model_construct(**asked)
    orders = order(config, micro_batches, virtual)
    count = len(stage_ranks(config, virtual))
    total = max(finish_times(orders, count).values())
    busy = sum(COST[task.kind] for task in orders[0])
    return total / busy - 1.0
