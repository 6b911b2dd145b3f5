"""Runs from the first command to the last: train, stop, resume, evaluate, generate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from launcher.cli import call
from launcher.trained import load_trained
from tests.launcher.command import ROOT, manyforms, write_tiny


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder):
    return [record["loss"] for record in metrics(folder)]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A finished run's folder, and what was printed; trained once for this file."""
    home = tmp_path_factory.mktemp("once")
    config = write_tiny(home)
    code, shown, said = manyforms("train", config, MANYFORMS_CACHE=str(home / "cache"))
    assert code == 0, said
    return home / "run", shown


@pytest.fixture
def trained(once, tmp_path):
    """The folder of a finished run, copied, so that it may be changed; what was printed."""
    folder, shown = once
    shutil.copytree(folder, tmp_path / "trained")
    return tmp_path / "trained", shown.replace(str(folder), str(tmp_path / "trained"))


def test_a_run_leaves_its_folder_complete(trained):
    folder, _ = trained
    there = {path.name for path in folder.iterdir()}
    assert there >= {
        "config.yaml", "metrics.jsonl", "events.jsonl", "log.txt", "summary.json", "tensorboard",
        "checkpoints", "tokenizer",
    }  # fmt: skip
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_the_end_compares_with_compressors_shows_a_sample_and_says_what_next(trained):
    folder, shown = trained
    for name in ("this model", "gzip -9", "xz"):
        assert f"\n  {name} " in shown
    assert "A sample:" in shown
    for command in (
        f"manyforms resume {folder} train.steps=12",
        f"manyforms eval {folder}",
        f"tensorboard --logdir {folder / 'tensorboard'}",
    ):
        assert command in shown


def test_the_written_config_repeats_the_run(trained, tmp_path):
    folder, _ = trained
    assert call(["train", str(folder / "config.yaml"), f"run.dir={tmp_path / 'again'}"]) == 0
    assert losses(tmp_path / "again") == losses(folder)


def test_resume_is_the_unbroken_run(tiny, tmp_path):
    assert call(["train", str(tiny), f"run.dir={tmp_path / 'short'}", "train.steps=4",
                 "train.schedule=constant"]) == 0  # fmt: skip
    assert call(["train", str(tiny), f"run.dir={tmp_path / 'long'}",
                 "train.schedule=constant"]) == 0  # fmt: skip
    assert call(["resume", str(tmp_path / "short"), "train.steps=6"]) == 0
    assert losses(tmp_path / "short") == losses(tmp_path / "long")


def test_resume_on_another_number_of_processes(tiny, tmp_path):
    base = ["train", tiny, "train.schedule=constant"]
    assert manyforms(*base, f"run.dir={tmp_path / 'long'}")[0] == 0
    code, _, said = manyforms(*base, f"run.dir={tmp_path / 'two'}", "train.steps=4", "--nproc", 2)
    assert code == 0 and "[rank 0]" in said
    assert manyforms("resume", tmp_path / "two", "train.steps=6")[0] == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "long"), rel=1e-5)


def test_a_finished_run_says_how_to_train_on(trained, capsys):
    folder, _ = trained
    assert call(["resume", str(folder)]) == 2
    assert "train.steps=12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("model.dim=32", "model.dim"),
        ("model.block.0.feedforward.ratio=4", "model.block.0.feedforward"),
        ("data.tokenizer=bytes", "data.tokenizer"),
    ],
)
def test_resume_refuses_another_model(trained, capsys, change, key):
    folder, _ = trained
    before = (folder / "config.yaml").read_text()
    assert call(["resume", str(folder), change, "train.steps=9"]) == 2
    said = capsys.readouterr().err
    assert f": {key}" in said and "start a new" in said and said.count("\n") == 1
    assert (folder / "config.yaml").read_text() == before


def test_eval_gives_what_the_run_measured(trained, tmp_path, capsys):
    folder, _ = trained
    assert call(["eval", str(folder), "--json", str(tmp_path / "out.json")]) == 0
    measured = json.loads((tmp_path / "out.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for name, value in summary["validation"].items():
        assert measured[name] == pytest.approx(value, rel=1e-6)
    assert "bits_per_byte" in capsys.readouterr().out


def test_eval_of_one_checkpoint(trained, tmp_path):
    folder, _ = trained
    place = folder / "checkpoints" / "step-00000002"
    assert call(["eval", str(place), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["step"] == 2


def test_generate_repeats_with_the_seed(trained, capsys):
    folder, _ = trained
    texts = []
    for seed in (1, 1, 2):
        words = ["generate", str(folder), "--prompt", "3 tim", "--tokens", "8", "--seed", str(seed)]
        assert call(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("3 tim")


def test_the_moving_average_is_what_is_read(tiny, tmp_path):
    """Read alone, so that it is known to differ from the weights and to give the run's measure."""
    assert call(["train", str(tiny), "train.ema=0.5"]) == 0
    folder = tmp_path / "run"
    averaged = load_trained(folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("ema: 0.5", "ema: null"))
    plain = load_trained(folder)
    pairs = zip(averaged.engine.model.parameters(), plain.engine.model.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_checkpoint_list_and_verify(trained, capsys):
    folder, _ = trained
    assert call(["checkpoint", "list", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(f" {step} " in shown for step in (2, 4, 6))
    assert call(["checkpoint", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("verified") == 3
    file = next((folder / "checkpoints" / "step-00000004").glob("*.distcp"))
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    assert call(["checkpoint", "verify", str(folder)]) == 1
    assert capsys.readouterr().out.count("verified") == 2


def test_vision_ends_with_its_accuracy(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MANYFORMS_CACHE", str(tmp_path / "cache"))
    config = ROOT / "configs" / "quickstart-vision.yaml"
    words = ["train.steps=3", "train.schedule.warmup=0", f"run.dir={tmp_path / 'run'}"]
    assert call(["train", str(config), *words]) == 0
    assert "Held-out accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_says_how_to_go_on(tiny, tmp_path, processes):
    words = ["train", tiny, "train.steps=100000", "train.schedule=constant",
             "checkpoint.every=100000", "--nproc", processes]  # fmt: skip
    command = [sys.executable, "-m", "launcher.cli", *map(str, words)]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    record = tmp_path / "run" / "metrics.jsonl"
    try:
        limit = time.monotonic() + 60
        while not (record.exists() and record.stat().st_size):
            assert started.poll() is None, started.stderr.read()
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.kill(started.pid, signal.SIGINT)
        _, said = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 75, said
    last = said.strip().splitlines()[-1]
    assert "stopped by SIGINT" in last and f"manyforms resume {tmp_path / 'run'}" in last
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert "Traceback" not in said


def test_a_run_that_fails_says_so_on_one_line(tiny, tmp_path, capsys):
    """A learning rate that overflows: code 1, the step and the cause, the traceback in the log."""
    assert call(["train", str(tiny), "train.optimizer.lr=1e30", "train.clip=null"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("manyforms: ") and "step " in line and "rank" in line
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_a_failure_nobody_expected_names_rank_and_step(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "from torch import nn\n"
        "from core.registry import register\n"
        "@register('norm', 'fragile')\n"
        "class Fragile(nn.Identity):\n"
        "    calls = 0\n"
        "    def __init__(self, dim: int):\n"
        "        super().__init__()\n"
        "    def forward(self, x):\n"
        "        Fragile.calls += self.training and not x.is_meta\n"
        "        if Fragile.calls > 12 and os.environ.get('RANK') == '1':\n"
        "            raise RuntimeError('the fuse has blown')\n"
        "        return x\n"
    )
    tiny.write_text(tiny.read_text() + "plugins: [mine.py]\n")
    code, _, said = manyforms("train", tiny, "model.block.norm=fragile", "--nproc", 2)
    assert code == 1
    line = said.strip().splitlines()[-1]
    assert "rank 1, step " in line and "the fuse has blown" in line
    assert "Traceback" not in said
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Traceback" in log and "the fuse has blown" in log


def test_workers_of_torchrun_are_joined(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "-m", "launcher.cli", "train", str(tiny)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A sample:") == 1
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_during_start_up_is_one_line_and_leaves_nothing(tiny, tmp_path):
    """Sent to every process there is by then, as a terminal does."""
    command = [sys.executable, "-m", "launcher.cli", "train", str(tiny), "--nproc", "2"]
    started = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        time.sleep(1)
        os.killpg(started.pid, signal.SIGINT)
        _, said = started.communicate(timeout=60)
    finally:
        started.kill()
    assert (started.returncode, said.count("\n")) == (130, 1), said
    assert said.startswith("manyforms: interrupted")
    assert not (tmp_path / "run").exists()
