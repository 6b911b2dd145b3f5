"""Where a model is cut, and what is left of it on a rank."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch

from core.errors import UserError
from evaluation.contracts.parity import on_meta
from model.accounting import count
from parallel.config import ParallelConfig
from parallel.schedules import check_micro_batches, stage_ranks
from parallel.stages import Stages, divide
from tests.parallel.test_parity import config
from tests.parallel.test_pipeline import HIERARCHY


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_no_cut_is_better(parts: int, seed: int) -> None:
    """Against every way to cut: the dearest part is cheapest; of these, the most even."""
    costs = torch.randint(0, 9, (8,), generator=torch.Generator().manual_seed(seed)).tolist()

    def judged(cuts: list[int]) -> tuple[int, int]:
        sums = [sum(costs[a:b]) for a, b in pairwise(cuts)]
        return max(sums), sum(value * value for value in sums)

    inner = combinations(range(1, len(costs)), parts - 1)
    best = min(judged([0, *cuts, len(costs)]) for cuts in inner)
    found = divide(costs, parts)
    assert len(found) == parts + 1 and all(a < b for a, b in pairwise(found))
    assert judged(found) == best


def depths(model: dict[str, Any], stages: int) -> list[int]:
    """How many blocks each stage holds."""
    found = Stages(on_meta(model), stages)
    return [
        sum("blocks" in name for unit in found.of(stage) for name in unit.modules)
        for stage in range(stages)
    ]


def test_blocks_are_balanced_against_the_head() -> None:
    assert depths({**config("llama"), "depth": 6, "vocab": 8}, 3) == [2, 2, 2]
    assert depths({**config("llama"), "depth": 5, "vocab": 8}, 2) in ([3, 2], [2, 3])
    # A head as dear as several blocks takes their place on the last stage.
    assert depths({**config("llama"), "depth": 6, "vocab": 1024}, 3) == [3, 3, 0]


def test_costs_are_the_whole_models() -> None:
    model = on_meta(HIERARCHY)
    stages = Stages(model, 3)
    assert sum(stages.costs) == count(model, model.example()).forward_flops  # type: ignore[operator]
    assert min(stages.costs) > 0, "the stem, each block with its resampler, the head"


def test_too_many_stages() -> None:
    model = on_meta(config("llama"))
    assert len(Stages(model, 4).bounds) == 5
    with pytest.raises(UserError, match=r"5 stages are too many .* cut into 4 at most"):
        Stages(model, 5)


def test_what_is_left_of_a_model() -> None:
    """Names stay; a tied table is on both ends; every parameter is somewhere."""
    model = on_meta({**config("llama"), "depth": 5, "vocab": 8})
    every = {name for name, _ in model.named_parameters()}
    holders = Stages(model, 3).holders(model, [0, 1, 2])
    assert holders["embedding.weight"] == [0, 2]
    seen: set[str] = set()
    for stage in range(3):
        model = on_meta({**config("llama"), "depth": 5, "vocab": 8})
        stages = Stages(model, 3)
        (chunk,) = stages.take(model, [stage])
        kept = {name for name, _ in model.named_parameters()}
        assert kept == {name for name, ranks in holders.items() if stage in ranks}
        assert {id(p) for p in chunk.parameters()} == {id(p) for p in model.parameters()}
        assert kept < every
        seen |= kept
    assert seen == every


def test_where_stages_stand() -> None:
    def ranks(schedule: str, **options: Any) -> list[int]:
        return stage_ranks(ParallelConfig(pp=3, schedule=schedule, **options))  # type: ignore[arg-type]

    assert ranks("1f1b") == [0, 1, 2]
    assert ranks("interleaved_1f1b") == [0, 1, 2, 0, 1, 2]
    assert ranks("interleaved_zero_bubble", virtual_stages=3) == [0, 1, 2] * 3
    assert ranks("zbv") == ranks("dualpipev") == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "works"),
    [("1f1b", 3, 4), ("interleaved_1f1b", 9, 10), ("dualpipev", 1, 8)],
)
def test_numbers_of_micro_batches(schedule: str, micro_batches: int, works: int) -> None:
    asked = ParallelConfig(pp=4, schedule=schedule)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{micro_batches} micro-batch.* it can of {works}"):
        check_micro_batches(asked, micro_batches)
    check_micro_batches(asked, works)
    for free in ("gpipe", "zbv"):
        check_micro_batches(ParallelConfig(pp=4, schedule=free), 1)  # type: ignore[arg-type]
