"""The idle time of schedules, against what their papers say of equal stages."""

from __future__ import annotations

import pytest

from core.errors import UserError
from parallel.bubble import Task, bubble, finish_times, order
from parallel.config import ParallelConfig
from parallel.schedules import SCHEDULES, stage_ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_published_shares(ranks: int, rounds: int) -> None:
    """(P−1)/m where each rank holds one stage, (P−1)/(m·K) where it holds K."""
    m = ranks * rounds
    stock = (ranks - 1) / m
    for schedule in ("gpipe", "1f1b"):
        assert bubble(schedule, ranks, 1, m) == pytest.approx(stock)
    for virtual in (2, 3, 5):
        for schedule in ("interleaved_1f1b", "modular"):
            assert bubble(schedule, ranks, virtual, m) == pytest.approx(stock / virtual)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_halves_fill_gaps(ranks: int) -> None:
    """With backward passes in halves a third of what interleaving over two stages leaves."""
    wanted = bubble("interleaved_1f1b", ranks, 2, 2 * ranks) / 3
    for schedule in ("interleaved_zero_bubble", "zbv", "dualpipev"):
        assert bubble(schedule, ranks, 2, 2 * ranks) == pytest.approx(wanted)


def test_too_few_micro_batches_for_modular_leave_more_idle() -> None:
    """The paper asks for at least as many micro-batches as ranks."""
    assert bubble("modular", 8, 4, 4) > 7 / (4 * 4)


def test_no_pipeline() -> None:
    assert bubble("1f1b", 1, 1, 1) == 0.0


def test_what_cannot_run() -> None:
    with pytest.raises(UserError, match="it can of 8"):
        bubble("1f1b", 8, 1, 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_task_is_done_once(schedule: str) -> None:
    config = ParallelConfig(pp=4, schedule=schedule)  # type: ignore[arg-type]
    ranks = stage_ranks(config)
    for rank, tasks in enumerate(order(config, 8)):
        assert len(tasks) == len(set(tasks))
        done: dict[tuple[int, int], str] = {}
        for task in tasks:
            assert ranks[task.stage] == rank
            place = (task.stage, task.micro_batch)
            done[place] = done.get(place, "") + task.kind
        assert set(done.values()) <= {"FB", "FIW"}
        assert len(done) == 8 * ranks.count(rank)


def test_a_schedule_that_cannot_go_on() -> None:
    with pytest.raises(AssertionError, match="wait for each other"):
        finish_times([[Task("B", 0, 0), Task("F", 0, 0)]], 1)
