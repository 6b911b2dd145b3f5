"""A step of two real processes, recorded: computing, messages with axis and bytes, waiting."""

import json
import time
from itertools import pairwise

import pytest

from tests.training.helpers import LANGUAGE, language_data, make_engine, make_trainer
from training.callbacks.base import Callback

MODEL = {
    **LANGUAGE,
    "dim": 32,
    "block": {**LANGUAGE["block"], "feedforward": {"name": "swiglu", "ratio": 2.0}},
}


class Late(Callback):
    """Rank 1 comes late to the last step's reading of data, so rank 0 must wait for it."""

    def __init__(self, at):
        self.at = at

    def around(self, trainer, logged):
        if trainer.step + 1 == self.at and trainer.engine.layout.rank == 1:
            load = trainer.loader.step

            def slow(consumed):
                time.sleep(0.5)
                return load(consumed)

            trainer.loader.step = slow
        return super().around(trainer, logged)


def record(folder, layout=None, late=False, **options):
    callbacks = [Late(4)] if late else []
    make_trainer(
        language_data(),
        MODEL,
        make_engine(**(layout or {})),
        steps=4,
        timeline=4,
        folder=folder,
        callbacks=callbacks,
        **options,
    ).run()


def read(folder, rank=0):
    return json.loads((folder / "timeline" / f"rank-{rank}.json").read_text())


def kinds(timeline, kind):
    return [span for span in timeline["spans"] if span["kind"] == kind]


def test_one_process_computes_every_phase_and_sends_nothing(tmp_path):
    record(tmp_path)
    timeline = read(tmp_path)
    assert (timeline["step"], timeline["rank"], timeline["world"]) == (4, 0, 1)
    names = {span["name"] for span in kinds(timeline, "compute")}
    assert names >= {
        "data", "forward", "forward 0", "forward 1", "backward", "backward 0", "backward 1",
        "update",
    }  # fmt: skip
    assert not kinds(timeline, "collective") and not kinds(timeline, "wait")
    order = [span["name"] for span in kinds(timeline, "compute") if " " in span["name"]]
    assert order.index("forward 0") < order.index("forward 1") < order.index("backward 1")
    assert timeline["memory"] > 50e6


def test_a_recorded_run_is_the_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    record(tmp_path / "a")
    make_trainer(language_data(), MODEL, steps=4, folder=tmp_path / "b").run()
    losses = []
    for name in ("a", "b"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("layout", "axis", "expected"),
    [
        ({"tp": 2}, "tp", {"all_reduce"}),
        (
            {"tp": 2, "sequence_parallel": True},
            "tp",
            {"all_reduce", "all_gather", "reduce_scatter"},
        ),
        ({"fsdp": 2}, "fsdp", {"all_reduce", "all_gather", "reduce_scatter"}),
        ({"replicate": 2, "fsdp": 1}, "replicate", {"all_reduce"}),
        ({"pp": 2}, "pp", {"send", "receive", "broadcast", "all_reduce"}),
    ],
)
def test_messages_of_two_ranks_have_axis_and_bytes(ranks, tmp_path, layout, axis, expected):
    micro_batches = {"micro_batch": 4} if "pp" in layout else {}  # a pipeline needs some
    ranks.run(record, tmp_path, layout, **micro_batches)
    for rank in range(2):
        timeline = read(tmp_path, rank)
        assert timeline["place"] == {axis: rank}
        messages = kinds(timeline, "collective")
        assert {message["name"] for message in messages} == expected
        assert {message["axis"] for message in messages} == {axis}
        assert all(message["bytes"] > 0 for message in messages)
        own = [s for s in timeline["spans"] if s["kind"] != "collective"]
        for one, other in pairwise(own):
            assert other["start"] >= one["end"] - 1e-6  # computing and waiting do not overlap
        assert min(s["start"] for s in own) == 0.0


def test_tensor_parallel_messages_are_as_large_as_the_hidden_state(ranks, tmp_path):
    ranks.run(record, tmp_path, {"tp": 2})
    sizes = [message["bytes"] for message in kinds(read(tmp_path), "collective")]
    hidden = 8 * 8 * 32 * 4  # samples, tokens, width, bytes of a float
    assert sizes.count(hidden) >= 8  # two blocks with two sublayers, forward and backward


def test_who_is_early_waits_for_who_is_late(ranks, tmp_path):
    ranks.run(record, tmp_path, {"tp": 2}, late=True)
    early = sum(s["end"] - s["start"] for s in kinds(read(tmp_path), "wait"))
    assert early > 0.25  # of half a second; a busy machine comes late to its own first message
    reading = [s for s in kinds(read(tmp_path, 1), "compute") if s["name"] == "data"]
    assert reading[0]["end"] - reading[0]["start"] > 0.49


@pytest.mark.slow
def test_axes_are_told_apart_where_there_are_two(four_ranks, tmp_path):
    four_ranks.run(record, tmp_path, {"fsdp": 2, "tp": 2})
    axes = {message.get("axis") for message in kinds(read(tmp_path), "collective")}
    assert axes >= {"fsdp", "tp"}
