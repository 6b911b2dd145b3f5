"""Every layout makes the same run: AdamW, Muon, the average, validation, resume."""

from functools import lru_cache
from pathlib import Path

import pytest

from checkpoints.config import CheckpointConfig
from tests.training.helpers import LANGUAGE, Losses, language_data, make_engine, make_trainer

LAYOUTS = {
    "replicate2": {"replicate": 2, "fsdp": 1},
    "fsdp2": {"fsdp": 2},
    "tp2": {"tp": 2},
    "tp2+sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2+zbv": {"pp": 2, "schedule": "zbv"},
}
OPTIMIZERS = {
    "adamw": {"name": "adamw", "lr": 3e-3},
    "muon": {"name": "muon", "lr": 0.02, "weight_decay": 0.1},
}
# Gated, so that matrices of several shapes are sharded along either axis.
MODEL = {**LANGUAGE, "block": {**LANGUAGE["block"], "feedforward": {"name": "swiglu", "ratio": 2}}}


def train(optimizer, layout=None, folder=None, resume=False, steps=12, **options):
    """Losses and gradient norms, and held-out losses of the average; the same on every rank."""
    collected = Losses()
    trainer = make_trainer(
        language_data(),
        model=MODEL,
        engine=make_engine(**(layout or {})),
        steps=steps,
        micro_batch=2,
        optimizer=OPTIMIZERS[optimizer],
        schedule="constant",
        ema=0.8,
        folder=folder,
        checkpoint=CheckpointConfig(every=6, **{"async": False}) if folder else None,
        callbacks=[collected],
        **options,
    )
    outcome = trainer.run(resume=resume)
    rows = [(r["loss"], r["grad_norm"]) for r in collected.records]
    return rows, outcome.validation


@lru_cache
def alone(optimizer):
    return train(optimizer)


@lru_cache
def fifty():
    return train("adamw", steps=50)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_are_those_of_one_process(ranks, layout):
    """Losses and global gradient norms: 1e-5 at step 1, 1e-4 at step 50."""
    rows, _ = fifty()
    for theirs, _ in ranks.run(train, "adamw", LAYOUTS[layout], steps=50):
        assert len(theirs) == 50
        assert theirs[0] == pytest.approx(rows[0], rel=1e-5)
        assert theirs[-1] == pytest.approx(rows[-1], rel=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_are_one_process(ranks, layout, optimizer):
    rows, validation = alone(optimizer)
    for theirs, measured in ranks.run(train, optimizer, LAYOUTS[layout]):
        assert theirs[0] == pytest.approx(rows[0], rel=1e-5)
        for a, b in zip(theirs, rows, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        assert measured == pytest.approx(validation, rel=1e-4)
    assert rows[-1][0] < rows[0][0]


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2", "pp2+zbv"])
def test_saved_by_two_ranks_and_resumed_by_one(ranks, layout, tmp_path: Path):
    rows, validation = alone("muon")
    halves = ranks.run(train, "muon", LAYOUTS[layout], folder=tmp_path, steps=6)
    rest, measured = train("muon", folder=tmp_path, resume=True)
    for a, b in zip(halves[0][0] + rest, rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert measured == pytest.approx(validation, rel=1e-4)


@pytest.mark.parametrize("saved", ["alone", "tp2", "pp2+zbv"])
def test_resumed_as_a_pipeline(ranks, saved, tmp_path: Path):
    """A tied table stands in the checkpoint once, and each of its holders reads it."""
    rows, validation = alone("adamw")
    if saved == "alone":
        first, _ = train("adamw", folder=tmp_path, steps=6)
    else:
        first, _ = ranks.run(train, "adamw", LAYOUTS[saved], folder=tmp_path, steps=6)[0]
    for rest, measured in ranks.run(train, "adamw", LAYOUTS["pp2"], folder=tmp_path, resume=True):
        for a, b in zip(first + rest, rows, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        assert measured == pytest.approx(validation, rel=1e-4)


def test_saved_by_a_pipeline_and_resumed_by_tensor_ranks(ranks, tmp_path: Path):
    rows, _ = alone("muon")
    first, _ = ranks.run(train, "muon", LAYOUTS["pp2"], folder=tmp_path, steps=6)[0]
    rest, _ = ranks.run(train, "muon", LAYOUTS["tp2"], folder=tmp_path, resume=True)[0]
    for a, b in zip(first + rest, rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_resumed_at_the_same_layout_is_bitwise(ranks, layout, tmp_path: Path):
    same = LAYOUTS[layout]
    (rows, validation), _ = ranks.run(train, "muon", same)
    (first, _), _ = ranks.run(train, "muon", same, folder=tmp_path, steps=6)
    (rest, measured), _ = ranks.run(train, "muon", same, folder=tmp_path, resume=True)
    assert first + rest == rows
    assert measured == validation
