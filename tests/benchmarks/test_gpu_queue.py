"""The GPU queue's own parts, as far as a CPU can run them; what a GPU says is in the docs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import contracts, experts, step
from benchmarks.gpu.rows import Row, attempt, table
from core.registry import get
from model.accounting import count
from model.zoo import build_model

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_a_line() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and not ended.stderr
    assert ended.stdout.count("\n") == 1 and "no CUDA device" in ended.stdout


def test_a_mechanism_agrees_with_itself() -> None:
    exact, rough = contracts.apart(get("feedforward", "moe"), CPU)
    assert exact == 0 and 0 < rough < contracts.BFLOAT16


def test_what_is_off_or_broke_is_a_row_of_its_own() -> None:
    rows = contracts.judge({"norm:a": (1e-7, 1e-3), "norm:b": (1e-2, 1e-3), "norm:c": "no kernel"})
    failed = [row.name for row in rows if row.status == "failed"]
    assert failed == ["contract norm:c", "contract norm:b, float32", "contracts, float32"]


def test_grouped_experts_agree() -> None:
    assert experts.grouped(CPU).status == "ok"


def test_a_step_is_measured() -> None:
    small = {**step.BILLION, "dim": 32, "depth": 1, "vocab": 64, "max_length": 16}
    small["block"] = {**small["block"], "feedforward": {"name": "swiglu", "width": 64}}
    taken, flops, held = step.measure(small, 2, CPU, rounds=1)
    assert taken > 0 and flops > 0 and held == 0


def test_the_billion_is_one() -> None:
    with torch.device("meta"):
        model = build_model(step.BILLION)
    assert 0.9e9 < count(model).parameters < 1.1e9


def test_cards_are_known_by_name() -> None:
    assert step.rate_of("NVIDIA H200") == step.rate_of("NVIDIA H100 80GB HBM3")
    assert step.rate_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert step.rate_of("Some other card") is None


def test_a_part_that_breaks_leaves_the_others() -> None:
    def broken() -> Row:
        raise RuntimeError("no kernel image\nmore")

    rows = [attempt("a", broken), attempt("b", lambda: Row("b", "ok", 2.0, "ms"))]
    text = table(rows)
    assert (
        "| a | failed |  | RuntimeError: no kernel image |" in text and "| b | ok | 2 ms |" in text
    )
