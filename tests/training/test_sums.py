"""Scalars and vectors through one tensor; a mechanism's vectors in the metrics file."""

import json

import pytest
import torch

from tests.training.helpers import LANGUAGE, language_data, make_engine, make_trainer
from training.sums import pack, unpack

FEEDFORWARD = {"name": "moe", "experts": 3, "ratio": 2.0}
EXPERTS = {**LANGUAGE, "block": {**LANGUAGE["block"], "feedforward": FEEDFORWARD}}


def test_what_is_packed_comes_out_by_name():
    sums = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3.0), "c": torch.tensor([4.0])}
    packed = pack(sums)
    assert packed.dtype == torch.float64
    values = iter([*packed.tolist(), 9.0])
    assert unpack(sums, values) == ({"a": 3.0}, {"b": [1.0, 2.0], "c": [4.0]})
    assert next(values) == 9.0  # what stands behind them is left alone


def run(folder, layout=None, **options):
    trainer = make_trainer(
        language_data(), EXPERTS, make_engine(**(layout or {})), folder=folder, **options
    )
    trainer.run()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_vectors_are_lists_in_the_metrics_of_logged_steps(tmp_path):
    records = run(tmp_path, steps=5, log_every=2)
    assert [record["step"] for record in records] == [2, 4, 5]
    for record in records:
        for layer in range(2):
            load = record[f"moe/{layer}/load"]
            assert len(load) == 3
            assert sum(load) == pytest.approx(1.0)
    assert not any(isinstance(value, list) for name, value in records[-1].items() if "val/" in name)


def test_vectors_weigh_micro_batches_by_their_samples(tmp_path):
    """The load of a step is the mean over its micro-batches: no sum, and not the last one's."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a", steps=1)
    parts = run(tmp_path / "b", steps=1, micro_batch=2)
    assert parts[0]["moe/0/load"] == pytest.approx(whole[0]["moe/0/load"], rel=1e-5)


@pytest.mark.parametrize("layout", [{"replicate": 2, "fsdp": 1}, {"tp": 2}])
def test_vectors_on_two_ranks_are_those_of_one(ranks, tmp_path, layout):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = run(tmp_path / "one", steps=2)
    theirs = ranks.run(run, tmp_path / "two", layout, steps=2)[0]
    for mine, yours in zip(alone, theirs, strict=True):
        assert yours["moe/1/load"] == pytest.approx(mine["moe/1/load"], abs=1e-6)
