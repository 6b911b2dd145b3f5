"""The picture of a step, and its sums."""

from xml.etree import ElementTree

import pytest

from launcher.reports.timeline import (
    common,
    joined,
    share,
    shown_ranks,
    timeline_picture,
    used_colours,
)
from tests.launcher.reports.folders import spans, timeline


def test_where_the_time_went():
    sums = share(spans())
    assert (sums.step, sums.waiting) == pytest.approx((0.010, 0.002))
    assert sums.computing == pytest.approx(0.008)
    assert sums.sending == pytest.approx(0.004)
    assert sums.hidden == pytest.approx(0.002)  # 1 ms beside the forward pass, 1 ms the backward
    assert sums.messages == {("all_reduce", "tp"): (2, 3048)}


def test_times_that_overlap_count_once():
    assert joined([(3, 4), (0, 2), (1, 3)]) == [(0, 4)]
    assert common([(0, 2), (3, 6)], [(1, 4), (5, 9)]) == [(1, 2), (3, 4), (5, 6)]


def test_every_span_is_drawn_on_its_rank():
    drawn = ElementTree.fromstring(timeline_picture([timeline(0), timeline(1)]))
    boxes = [box for box in drawn.iter("rect") if box.find("title") is not None]
    assert len(boxes) == 2 * len(spans())
    words = [box.find("title").text for box in boxes]
    assert words.count("all reduce, 3 ms, tp, 2.0 KB") == 2
    by_class = {box.get("class"): float(box.get("width")) for box in boxes[:3]}
    assert by_class["p-forward"] == pytest.approx(2 * by_class["wait"], abs=0.1)
    labels = [text.text for text in drawn.iter("text")]
    assert "rank 1" in labels and "tp 1" in labels


def test_messages_under_way_at_once_lie_below_each_other():
    twice = timeline(0)
    twice["spans"].append({**twice["spans"][3]})
    drawn = ElementTree.fromstring(timeline_picture([twice]))
    tops = {box.get("y") for box in drawn.iter("rect") if box.get("class") == "a-tp"}
    assert len(tops) == 2


def test_of_many_ranks_some_are_shown():
    assert [t["rank"] for t in shown_ranks([timeline(r) for r in range(64)])] == list(
        range(0, 64, 4)
    )


def test_the_legend_holds_what_occurs():
    assert [words for _, words in used_colours([timeline(0)])] == [
        "forward", "backward", "waiting", "messages: tp",
    ]  # fmt: skip
