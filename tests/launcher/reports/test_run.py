"""Reading a run's folder, whole and broken."""

import pytest

from core.errors import UserError
from launcher.reports.run import read_run
from tests.launcher.reports.folders import write


def test_metrics_are_told_apart_by_name_and_shape(tmp_path):
    run = read_run(write(tmp_path))
    assert run.name == "by <hand>"
    assert run.steps == 40
    assert run.points("val/loss") == [(s, 3.9 - s / 20) for s in (10, 20, 30, 40)]
    assert run.rows("mohd/0/active")[39] == (40, [1.0, 0.25, 0.0])
    assert "novelty" in run.scalars() and "residual/0/rms" not in run.scalars()
    assert run.layers() == {
        ("residual", "rms"): {0: "residual/0/rms", 1: "residual/1/rms"},
        ("mohd", "active"): {0: "mohd/0/active", 1: "mohd/1/active"},
    }
    assert [timeline["rank"] for timeline in run.timelines] == [0, 1]


def test_what_is_cut_off_or_damaged_is_left_out(tmp_path):
    write(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "timeline" / "rank-0.json").write_text("")
    (tmp_path / "config.yaml").write_text("a: [")
    run = read_run(tmp_path)
    assert run.steps == 40
    assert run.summary == {} and run.config == {}
    assert [timeline["rank"] for timeline in run.timelines] == [1]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(UserError, match="is no run's folder"):
        read_run(tmp_path)
