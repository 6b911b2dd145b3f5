"""The command, on a run of its own and on folders that are none."""

import subprocess
import sys

from launcher.cli import call
from tests.launcher.command import ROOT, manyforms
from tests.launcher.reports.folders import write


def test_a_trained_run_becomes_a_page(tiny, capsys):
    assert manyforms("train", tiny, "train.timeline=4")[0] == 0
    folder = tiny.parent / "run"
    assert call(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf8")
    for part in ("Loss", "Bits per byte", "Hidden state behind each block", "Timeline of one step"):
        assert part in text


def test_the_page_goes_where_it_is_wanted(tmp_path, capsys):
    run, target = write(tmp_path / "run"), tmp_path / "page.html"
    assert call(["report", str(run), "--out", str(target)]) == 0
    assert target.stat().st_size > 10_000
    assert not (run / "report.html").exists()


def test_mistakes_are_one_line_and_code_2(tmp_path, capsys):
    assert call(["report", str(tmp_path)]) == 2
    assert call(["report", str(tmp_path / "none")]) == 2
    assert call(["report", str(write(tmp_path / "run")), "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "is no run's folder" in lines[0]
    assert "no such folder" in lines[1]
    assert "cannot be written" in lines[2]


def test_it_does_not_wait_for_torch():
    code = "import sys, launcher.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
