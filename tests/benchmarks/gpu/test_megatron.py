"""The Megatron part of the GPU queue: what it says where it cannot run, and how it judges."""

import pytest
import torch

from benchmarks.gpu import megatron
from benchmarks.gpu.rows import Row, attempt, table


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = megatron.main()
    assert row.status == "refused" and "need a GPU" in row.note


def test_a_part_that_breaks_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks() -> Row:
        raise RuntimeError("no such kernel\nsecond line")

    row = attempt("part", breaks)
    assert (row.status, row.note) == ("failed", "RuntimeError: no such kernel")
    assert "Traceback" in capsys.readouterr().err


def test_the_tensor_furthest_off_is_judged() -> None:
    wanted = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    error = megatron.apart({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.01])}, wanted)
    assert error == pytest.approx(0.1)
    assert megatron.judged("x", error, 0.05, "").status == "failed"
    assert megatron.judged("x", error, 0.2, "").status == "ok"


def test_table() -> None:
    rows = [Row("a", "ok", 0.00012345, "relative", "fine"), Row("b", "refused", note="no GPU")]
    assert table(rows).splitlines()[2:] == [
        "| a | ok | 0.000123 relative | fine |",
        "| b | refused |  | no GPU |",
    ]
