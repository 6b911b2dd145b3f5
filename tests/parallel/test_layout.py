"""Sizes of the axes, places of the ranks, and what is said when they do not fit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from core.config import parse
from core.errors import UserError
from parallel.config import ParallelConfig
from parallel.layout import Layout


def layout(world: int, rank: int = 0, **options: Any) -> Layout:
    return Layout.of(ParallelConfig(**options), world, rank)


def test_what_is_left() -> None:
    assert layout(8, tp=2).shape == (1, 1, 4, 1, 1, 2)
    assert layout(8, tp=2, replicate=2).shape == (1, 2, 2, 1, 1, 2)
    assert layout(6, tp=2, replicate=-1, fsdp=1).shape == (1, 3, 1, 1, 1, 2)
    assert layout(24, pp=3, ep=2, cp=2).shape == (3, 1, 2, 2, 2, 1)
    assert layout(1).shape == (1, 1, 1, 1, 1, 1)


def test_places() -> None:
    places = [layout(8, rank, tp=2, replicate=2) for rank in range(8)]
    found = [tuple(place.coordinates[a] for a in ("replicate", "fsdp", "tp")) for place in places]
    assert found == list(itertools.product(range(2), repeat=3))
    assert [place.data_rank for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [place.coordinates["tp"] for place in places] == [0, 1] * 4
    assert {(place.data_size, place.world) for place in places} == {(4, 8)}


def test_what_shares_data_and_storage() -> None:
    places = [layout(16, rank, pp=2, ep=2, cp=2) for rank in range(16)]
    assert [place.coordinates["pp"] for place in places] == [0] * 8 + [1] * 8
    # Along cp the samples are alike; along ep, as along fsdp, they are not.
    assert [place.data_rank for place in places] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert [place.shard_rank for place in places] == list(range(8)) * 2
    assert {(place.shard, place.expert_shard) for place in places} == {(8, 4)}
    assert [place.expert_shard_rank for place in places] == [0, 1, 0, 1, 2, 3, 2, 3] * 2


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (
            3,
            {"tp": 2},
            "parallel: 3 processes cannot be divided into replicate 1 × fsdp -1 × tp 2: 3 is not a "
            "multiple of 2; start 2, or set parallel.replicate=1 parallel.fsdp=3 parallel.tp=1",
        ),
        (
            1,
            {"tp": 2, "sequence_parallel": True},
            "parallel: replicate 1 × fsdp -1 × tp 2 needs at least 2 processes, but there are 1; "
            "start 2, or set parallel.replicate=1 parallel.fsdp=1 parallel.tp=1 "
            "parallel.sequence_parallel=false",
        ),
        (
            4,
            {"fsdp": 2},
            "parallel: replicate 1 × fsdp 2 × tp 1 needs 2, but there are 4 processes: more "
            "processes than the layout needs; start 2, or set parallel.fsdp=-1",
        ),
        (
            2,
            {"replicate": 2, "fsdp": 2},
            "parallel: replicate 2 × fsdp 2 × tp 1 needs 4 processes, but there are 2; "
            "start 4, or set parallel.replicate=2 parallel.fsdp=1 parallel.tp=1",
        ),
    ],
)
def test_what_does_not_fit(world: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        layout(world, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("options", [{"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"fsdp": 2}])
@pytest.mark.parametrize("world", range(1, 13))
def test_the_layout_named_instead_fits(world: int, options: dict[str, Any]) -> None:
    try:
        layout(world, **options)
    except UserError as error:
        wanted = [part for part in str(error).split() if part.startswith("parallel.")]
        changes = dict(part.removeprefix("parallel.").split("=") for part in wanted)
        assert layout(world, **{**options, **changes}).world == world


def test_the_documented_section_parses() -> None:
    section = {
        "engine": "native", "replicate": 1, "fsdp": -1, "tp": 1, "pp": 1, "ep": 1, "cp": 1,
        "schedule": "1f1b", "zero_stage": 2,
    }  # fmt: skip
    config = parse(ParallelConfig, section)
    assert config == ParallelConfig()
    assert parse(ParallelConfig, config.dump()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "natvie"}, "did you mean 'native'"),
        ({"pp": 0}, "pp"),
        ({"schedule": "gpipe"}, "is a pipeline's; it needs pp above 1"),
        ({"pp": 2, "schedule": "zbw"}, "schedule"),
        ({"zero_stage": 3}, "is DeepSpeed's; it needs engine: deepspeed"),
        ({"fsdp": -1, "replicate": -1}, "cannot both be -1"),
        ({"fsdp": 0}, "fsdp: 0"),
        ({"sequence_parallel": True}, "needs tp above 1"),
        ({"tensor": 2}, "unknown key 'tensor'"),
    ],
)
def test_mistakes_in_the_section(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(ParallelConfig, options)
