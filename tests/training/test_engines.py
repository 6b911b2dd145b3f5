"""Three engines make the same run, and a run moves between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.config import CheckpointConfig
from core.config import parse
from evaluation.contracts.ranks import Ranks
from parallel.config import ParallelConfig
from parallel.layout import Layout
from tests.training.helpers import LANGUAGE, Losses, language_data, make_trainer

pytest.importorskip("deepspeed", reason="pip install 'manyforms[deepspeed]'")
pytest.importorskip("megatron.core", reason="pip install 'manyforms[megatron]'")

ENGINES: dict[str, dict[str, Any]] = {
    "native": {"fsdp": 2},
    "deepspeed": {"engine": "deepspeed", "zero_stage": 3},
    "megatron": {"engine": "megatron", "tp": 2, "sequence_parallel": True},
}
ROUTE = ("native", "deepspeed", "megatron", "native")
MODEL = {**LANGUAGE, "block": {**LANGUAGE["block"], "feedforward": {"name": "swiglu", "ratio": 2}}}
EACH = 5
"""Steps under each engine of the route."""


def train(
    options: dict[str, Any], steps: int, folder: Path | None = None, resume: bool = False
) -> list[tuple[float, float]]:
    """On a rank: losses and gradient norms of the steps that this call takes."""
    config = parse(ParallelConfig, options)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    layout = Layout.of(config, world, rank)
    engine = config.engine.build(layout=layout, device=torch.device("cpu"), config=config)
    collected = Losses()
    trainer = make_trainer(
        language_data(),
        model=MODEL,
        engine=engine,
        steps=steps,
        micro_batch=2,
        optimizer={"name": "adamw", "lr": 3e-3},
        schedule="constant",
        folder=folder,
        checkpoint=CheckpointConfig(every=EACH, **{"async": False}) if folder else None,
        callbacks=[collected],
    )
    trainer.run(resume=resume)
    return [(record["loss"], record["grad_norm"]) for record in collected.records]


def test_fifty_steps_are_alike(ranks: Ranks) -> None:
    runs = {name: ranks.run(train, options, 50)[0] for name, options in ENGINES.items()}
    for name in ("deepspeed", "megatron"):
        assert len(runs[name]) == 50
        for mine, native in zip(runs[name], runs["native"], strict=True):
            assert mine == pytest.approx(native, rel=1e-4), name
    assert runs["native"][-1][0] < runs["native"][0][0]


def test_a_run_moves_from_engine_to_engine(ranks: Ranks, tmp_path: Path) -> None:
    """Nothing is lost on the way: the losses are those of a run that stayed."""
    moved: list[tuple[float, float]] = []
    for turn, name in enumerate(ROUTE):
        steps = EACH * (turn + 1)
        moved += ranks.run(train, ENGINES[name], steps, tmp_path, resume=turn > 0)[0]
    stayed = ranks.run(train, ENGINES["native"], EACH * len(ROUTE))[0]
    assert len(moved) == len(stayed)
    for mine, native in zip(moved, stayed, strict=True):
        assert mine == pytest.approx(native, rel=1e-4)
