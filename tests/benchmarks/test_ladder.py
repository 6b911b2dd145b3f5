"""The arithmetic of the ladder benchmark; that its network is refused or removed cleanly."""

import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import ladder, veth
from benchmarks.ladder_picture import draw


def answer(*, standard, other, silent=0):
    """One rank's answer: (ms, bytes) of three rounds."""
    modes = {
        "standard": [[ms, 1000] for ms in standard],
        "ladder": [[ms, 1000] for ms in other],
        "none": [[100.0, silent]] * len(standard),
    }
    return {"passes": {"training step": modes, "forward": modes}}


def measured():
    first = answer(standard=[200.0, 190.0, 300.0], other=[140.0, 130.0, 150.0])
    second = answer(standard=[180.0, 200.0, 180.0], other=[120.0, 140.0, 120.0])
    return [row for rate in (500, 1000) for row in ladder.rows(rate, [first, second])]


def test_the_slower_rank_counts_and_rounds_are_paired():
    row = measured()[0]
    assert row.times["standard"] == [200.0, 200.0, 300.0]
    assert row.times["ladder"] == [140.0, 140.0, 150.0]
    assert row.gain == pytest.approx(200 / 140)
    assert row.hidden[1] == pytest.approx(0.6)  # of the rounds' 0.6, 0.6 and 0.75
    assert row.ratio == pytest.approx(1.0)
    assert "| forward | 1000 | 200 (200–250) |" in ladder.table(measured())


def test_no_communication_means_none():
    loud = answer(standard=[200.0, 200.0], other=[150.0, 150.0], silent=900)
    with pytest.raises(AssertionError, match="not silent"):
        ladder.rows(500, [loud, loud])


def test_the_picture_has_a_line_for_each_mode_and_pass():
    tags = [e.tag.split("}")[1] for e in ElementTree.fromstring(draw(measured())).iter()]
    assert tags.count("polyline") == 3 + 2 and tags.count("circle") == 2 * (3 + 2)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("geteuid", lambda: 1000, "need root"), ("which", lambda tool: None, "ip, tc, taskset: not")],
)
def test_refused_in_one_line(name, value, said, monkeypatch, capsys):
    monkeypatch.setattr(shutil if name == "which" else os, name, value)
    if name == "geteuid":
        monkeypatch.setattr(shutil, "which", lambda tool: tool)
    assert ladder.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def namespaces(process):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if f"manyforms-{process}-" in line]


@pytest.fixture
def network():
    """Skips where this process may not make network namespaces."""
    try:
        with veth.Link() as link:
            link.limit(100)
    except veth.UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_behind(number, network):
    """Stopped while its ranks start."""
    command = [sys.executable, "-m", "benchmarks.ladder", "--rounds", "2"]
    run = subprocess.Popen(command, cwd=Path(ladder.__file__).parents[1])
    inside = ["ip", "netns", "pids", f"manyforms-{run.pid}-1"]
    try:
        ranks: list[str] = []
        while not ranks:  # the last thing to be started
            assert run.poll() is None
            found = subprocess.run(inside, capture_output=True, text=True, check=False)
            ranks = found.stdout.split()
        assert len(namespaces(run.pid)) == 2
        run.send_signal(number)
        assert run.wait(30) == 128 + number
    finally:
        run.kill()
    assert not namespaces(run.pid)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
