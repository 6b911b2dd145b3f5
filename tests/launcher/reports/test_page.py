"""The page: whole, and of runs with missing pieces."""

import re
from xml.etree import ElementTree

import pytest

from launcher.reports.page import page
from launcher.reports.run import read_run
from tests.launcher.reports.folders import write


def notes(text):
    return [re.sub("<[^>]*>", "", note) for note in re.findall('card note">(.*?)</div>', text)]


def test_a_whole_run_lacks_nothing_and_needs_nothing_from_outside(tmp_path):
    text = page(read_run(write(tmp_path)))
    assert notes(text) == []
    for word in ("by &lt;hand&gt;", "12.3k", "1 h 2 min", "2.13.0", "Ran to its end"):
        assert word in text
    assert "<script" not in text and "http" not in text and "@import" not in text
    pictures = re.findall("<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 7 + 3 + 1
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_events_are_in_the_table_and_nothing_in_them_is_markup(tmp_path):
    text = page(read_run(write(tmp_path)))
    table = text[text.index("<h2>Events") :]
    assert "2 saves" in table and "10, 20" in table
    assert "the loss is &lt;nan&gt;" in table


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("metrics.jsonl", "No step has been logged"),
        ("events.jsonl", "events.jsonl is missing"),
        ("summary.json", "There is no summary.json"),
        ("timeline", "train.timeline=20"),
        ("config.yaml", "There is no config.yaml"),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_there(tmp_path, missing, said):
    text = page(read_run(write(tmp_path, but=[missing])))
    assert [said in note for note in notes(text)] == [True]
    assert "<h2>Curves" in text and "<h2>Events" in text


def test_a_run_without_validation_norms_and_routing_is_told_how_to_get_them(tmp_path):
    write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "loss": 2.0, "memory_gb": 1.0}\n')
    said = notes(page(read_run(tmp_path)))
    folder = str(tmp_path)
    assert said[0].endswith(f"manyforms resume {folder} train.validate_every=50 train.steps=80")
    assert "train.layer_norms=true" in said[1]
    assert "manyforms zoo" in said[2]


def test_ranks_that_left_no_recording_are_counted(tmp_path):
    write(tmp_path)
    (tmp_path / "timeline" / "rank-1.json").unlink()
    assert notes(page(read_run(tmp_path))) == [
        "Of 1 of 2 ranks there is no recording in timeline/."
    ]
