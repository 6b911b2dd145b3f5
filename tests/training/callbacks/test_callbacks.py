"""What people and tools read: the bar, plain lines, TensorBoard, summaries."""

import io
import logging
import re

import pytest
import torch

from tests.training.helpers import LANGUAGE, make_trainer
from training.callbacks.progress import Progress, duration, short
from training.meter import Meter, memory, peak_flops


class Terminal(io.StringIO):
    def isatty(self):
        return True


def swap_progress(trainer, progress):
    trainer.callbacks = [
        progress if isinstance(callback, Progress) else callback for callback in trainer.callbacks
    ]
    return trainer


def test_the_bar_shows_loss_speed_and_time_left(monkeypatch):
    monkeypatch.setattr("training.callbacks.progress.BETWEEN_FRAMES", 0.0)
    monkeypatch.setenv("COLUMNS", "160")
    screen = Terminal()
    swap_progress(make_trainer(steps=4), Progress(screen)).run()
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())  # without colours and moves
    assert re.search(r"2/4 .*loss \d\.\d{4}  [\d.]+k? tokens/s  \d+:\d\d left", text)
    assert re.search(r"4/4 .*held-out \d\.\d{4}  \d\.\d{4} bits/byte", text)


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    # A handler of its own: a command run by an earlier test may have configured the logger.
    logger, messages = logging.getLogger("manyforms"), []
    keep = logging.Handler()
    keep.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [keep])
    logger.setLevel(logging.INFO)
    swap_progress(make_trainer(steps=4), Progress(io.StringIO())).run()
    lines = [m for m in messages if m.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "4/4"]
    assert "held-out" in lines[-1]


def test_numbers_for_people():
    assert [duration(s) for s in (5, 65, 7384)] == ["0:05", "1:05", "2:03:04"]
    assert [short(n) for n in (12, 1234, 3.456e6, 2e9)] == ["12", "1.23k", "3.46M", "2G"]


def test_tensorboard_holds_what_the_metrics_file_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.training.test_trainer import lines

    make_trainer(steps=3, folder=tmp_path).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = lines(tmp_path / "metrics.jsonl")
    assert set(events.Tags()["scalars"]) == {
        key for record in records for key in record if key != "step"
    }
    loss = [(e.step, e.value) for e in events.Scalars("loss")]
    assert loss == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records]


def test_tensorboard_shows_a_vector_as_bars_over_its_entries(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.training.test_trainer import lines

    feedforward = {"name": "moe", "experts": 3, "ratio": 2.0}
    model = {**LANGUAGE, "block": {**LANGUAGE["block"], "feedforward": feedforward}}
    make_trainer(model=model, steps=2, folder=tmp_path).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["histograms"]) == {"moe/0/load", "moe/1/load"}
    shown = events.Histograms("moe/1/load")[-1]
    load = lines(tmp_path / "metrics.jsonl")[-1]["moe/1/load"]
    bars = dict(zip(shown.histogram_value.bucket_limit, shown.histogram_value.bucket, strict=True))
    assert [bars[float(i + 1)] for i in range(3)] == pytest.approx(load)  # from i to i + 1
    assert bars.get(0.0, 0.0) == 0.0


def test_the_meter_counts_only_the_time_of_steps(monkeypatch):
    clock = iter([10.0, 12.0, 50.0, 52.0])
    monkeypatch.setattr("training.meter.time.perf_counter", lambda: next(clock))
    meter = Meter("tokens", torch.device("cpu"), devices=2)
    meter.flops_per_unit = 6e12
    for _ in range(2):
        meter.begin()
        meter.finish(100)
    record = meter.read()
    assert record["tokens_per_second"] == 50.0
    assert record["tflops_per_device"] == pytest.approx(150.0)
    assert "mfu" not in record  # no peak is made up for a CPU
    meter.peak = 300e12
    monkeypatch.setattr("training.meter.time.perf_counter", iter([0.0, 1.0]).__next__)
    meter.begin()
    meter.finish(50)
    assert meter.read()["mfu"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_the_devices_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_memory_is_at_least_what_this_process_holds_in_torch():
    assert memory(torch.device("cpu")) > 50e6
