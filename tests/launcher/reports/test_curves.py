"""Curves: which there are, where their points lie, what is marked on them."""

import re
from xml.etree import ElementTree

from launcher.reports.curves import HEIGHT, LEFT, RIGHT, WIDTH, Kind, chart, curves, event_marks
from launcher.reports.run import read_run
from tests.launcher.reports.folders import write


def test_every_metric_has_a_chart_known_ones_first(tmp_path):
    titles = [title for title, _, _ in curves(read_run(write(tmp_path)))]
    assert titles == [
        "Loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput",
        "Peak memory of rank 0", "novelty",
    ]  # fmt: skip


def test_a_line_goes_from_its_first_value_to_its_last():
    drawn = ElementTree.fromstring(chart(Kind("x"), [(1, 2.0), (100, 1.0)], []))
    (line,) = drawn.iter("polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    assert points[-1][0] == WIDTH - RIGHT
    assert points[0][0] < LEFT + 5
    assert points[0][1] < points[1][1] < HEIGHT  # downward, as the values go
    assert "1" in [text.text for text in drawn.iter("text") if text.get("class") == "end training"]


def test_events_are_marked_where_they_happened(tmp_path):
    marks = event_marks(read_run(write(tmp_path)))
    assert marks == [(10, "save"), (20, "save"), (25, "failure"), (20, "resume")]
    drawn = chart(Kind("x"), [(s, float(s)) for s in range(1, 41)], [], marks)
    titles = re.findall("<title>([^<]*(?:saved|at step)[^<]*)</title>", drawn)
    assert titles == [
        "saved after step 10", "saved after step 20", "failure at step 25", "resume at step 20",
    ]  # fmt: skip
    assert drawn.count('class="event bad"') == 2  # the failure's line and word


def test_no_more_points_than_can_be_seen():
    many = [(s, float(s % 7)) for s in range(1, 20001)]
    assert len(chart(Kind("x", smooth=True), many, many)) < 60_000


def test_values_that_a_logarithm_cannot_show_and_a_single_value():
    """Breaks if a zero reaches the logarithm, or a span of one value is divided by."""
    for drawn in (
        chart(Kind("x", log=True), [(1, 0.0), (2, 1.0), (3, 10.0)], []),
        chart(Kind("x"), [(5, 3.0)], []),
    ):
        ElementTree.fromstring(drawn)
        assert "nan" not in drawn and "inf" not in drawn
