"""Per-layer metrics are drawn from their names alone."""

import re
from xml.etree import ElementTree

from launcher.reports.layers import COLUMNS, ROWS, heat_map, layer_charts, layer_lines
from launcher.reports.run import read_run
from tests.launcher.reports.folders import write


def test_a_mechanism_that_nobody_knows_is_drawn(tmp_path):
    titles = [title for title, _, _ in layer_charts(read_run(write(tmp_path)))]
    assert titles == [
        "Hidden state behind each block", "mohd: active, layer 0", "mohd: active, layer 1",
    ]  # fmt: skip


def shades(drawn):
    """Shade → how much of the map it covers, in cells of a step and an entry."""
    found = {}
    for path in re.findall(r'<path d="([^"]*)" class="heat" fill-opacity="([^"]*)"', drawn):
        widths = [float(w) for w in re.findall(r"h(\d[\d.]*)v", path[0])]
        found[float(path[1])] = sum(widths)
    return found


def test_shades_follow_the_values():
    rows = [(step, [1.0, 0.5, 0.0]) for step in range(1, 11)]
    found = shades(heat_map("x", rows, highest=1.0))
    assert set(found) == {1.0, 0.5}
    assert found[1.0] == found[0.5]
    half = shades(heat_map("x", rows, highest=2.0))
    assert set(half) == {0.5, 0.25}  # all layers share one scale


def test_the_bars_are_the_last_values():
    rows = [(1, [1.0, 0.0]), (2, [0.0, 0.5])]
    drawn = ElementTree.fromstring(heat_map("x", rows, highest=1.0))
    widths = [float(bar.get("width")) for bar in drawn.iter("rect") if bar.get("class") == "bar"]
    assert widths[0] == 0.0 and widths[1] > 0
    titles = [title.text for title in drawn.iter("title")]
    assert titles[1] == "entry 1: 0.5 at the end, 0.25 on average"


def test_many_steps_and_entries_are_averaged():
    rows = [(step, [float(e % 2) for e in range(1000)]) for step in range(1, 5001)]
    drawn = heat_map("x", rows, highest=1.0)
    assert drawn.count('class="bar"') == ROWS
    assert len(drawn) < 200 * COLUMNS * ROWS


def test_layers_are_stronger_the_deeper_they_lie():
    layers = {n: [(1, 1.0), (2, 2.0 + n)] for n in range(6)}
    drawn = ElementTree.fromstring(layer_lines("x", layers))
    strengths = [float(line.get("stroke-opacity")) for line in drawn.iter("polyline")]
    assert strengths == sorted(strengths) and strengths[-1] == 1.0
    assert [t.text for t in drawn.iter("text") if t.text.startswith("layer")] == [
        "layer 5", "layer 0",
    ]  # fmt: skip
