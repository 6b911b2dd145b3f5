"""What mechanisms report of each layer, drawn from its name alone: `<mechanism>/<layer>/<what>`.

A scalar of each layer is a line a layer; a vector (the load of each expert, how often each
dimension was active) is a heat map over the steps, with its last values as bars beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from launcher.reports.curves import BOTTOM, HEIGHT, LEFT, MOST, RIGHT, TOP, WIDTH
from launcher.reports.run import Points, Rows, Run
from launcher.reports.scale import Scale, binned, short
from launcher.reports.svg import axes, line, picture, tag, text, title

Item = TypeVar("Item")
WORDS = {
    ("residual", "rms"): ("Hidden state behind each block", "root mean square"),
    ("moe", "load"): ("Expert load", "share of the assignments that each expert receives"),
    ("moe", "entropy"): ("Router entropy", "nats"),
    ("moe", "dropped"): ("Dropped assignments", "share"),
}
"""Those with words of their own; any other is drawn under its name."""
COLUMNS, ROWS, LEVELS = 100, 64, 12
"""The most cells across and down, and the shades between the lowest and the highest value."""
MAP_WIDTH, MAP_LEFT, MAP_RIGHT = 560, 56, 108


def layer_charts(run: Run) -> list[tuple[str, str, str]]:
    """Title, unit and picture of everything that mechanisms report, lines first."""
    lines, maps = [], []
    for (mechanism, what), names in run.layers().items():
        words, unit = WORDS.get((mechanism, what), (f"{mechanism}: {what.replace('_', ' ')}", ""))
        points = {layer: run.points(name) for layer, name in names.items()}
        points = {layer: held for layer, held in points.items() if held}
        if points:
            lines.append((words, unit, layer_lines(words, points)))
        rows = {layer: run.rows(name) for layer, name in names.items()}
        highest = max((v for held in rows.values() for _, row in held for v in row), default=0.0)
        for layer, held in rows.items():
            if held:
                maps.append((f"{words}, layer {layer}", unit, heat_map(words, held, highest)))
    return lines + maps


def layer_lines(words: str, layers: dict[int, Points]) -> str:
    """A line a layer, the deeper the stronger."""
    values = [v for points in layers.values() for _, v in points]
    steps = [s for points in layers.values() for s, _ in points]
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < 0.5 * high else low
    x = Scale(0, max(steps), LEFT, WIDTH - RIGHT)
    y = Scale(low, high + (high - low) * 0.05, HEIGHT - BOTTOM, TOP)
    parts = axes(x, y)
    ends = []
    for order, (layer, points) in enumerate(layers.items()):
        strength = 1.0 if len(layers) == 1 else 0.3 + 0.7 * order / (len(layers) - 1)
        dots = [(x(s), y(v)) for s, v in binned(points, MOST)]
        hint = title(f"layer {layer}: {short(points[-1][1])} at step {points[-1][0]}")
        shape = line(dots, "layer", stroke_opacity=strength)
        parts.append(f"<g>{hint}{shape}</g>")
        ends.append((dots[-1][1], f"layer {layer}", points[-1][1]))
    shown = ends if len(ends) <= 4 else [ends[0], ends[-1]]
    below = -99.0
    for at, label, _ in sorted(shown):
        below = max(at, below + 13)
        parts.append(text(WIDTH - RIGHT + 6, below + 4, label, "tick"))
    return picture(WIDTH, HEIGHT, parts, words)


def heat_map(words: str, rows: Rows, highest: float) -> str:
    """Entries downward, steps across, from 0 (the page's own colour) to the highest value."""
    entries = min(len(values) for _, values in rows)
    table = _shrunk([values[:entries] for _, values in rows])
    across, down = len(table), len(table[0])
    cell = max(3.0, min(18.0, 200 / down))
    height = TOP + down * cell + BOTTOM
    x = Scale(0, across, MAP_LEFT, MAP_WIDTH - MAP_RIGHT)
    highest = highest or 1.0
    parts = [
        tag("rect", x=x.start, y=TOP, width=x.end - x.start, height=down * cell, class_="ground")
    ]
    parts += _cells(table, x, cell, highest)
    per = entries / down
    for index in range(down):
        top = TOP + index * cell
        first, final = round(index * per), round((index + 1) * per) - 1
        name = f"entry {first}" if final <= first else f"entries {first} to {final}"
        last = table[-1][index]
        mean = sum(column[index] for column in table) / across
        hint = title(f"{name}: {short(last)} at the end, {short(mean)} on average")
        bar = tag("rect", x=x.end + 8, y=top + cell * 0.15, height=cell * 0.7,
                  width=max((MAP_RIGHT - 60) * last / highest, 0.0), class_="bar")  # fmt: skip
        area = tag("rect", x=x.start, y=top, width=x.end - x.start, height=cell, class_="hint")
        parts.append(f"<g>{hint}{bar}{area}</g>")
        if down <= 16 or index % max(down // 8, 1) == 0:
            parts.append(text(x.start - 7, top + cell / 2 + 4, str(first), "tick", "end"))
            parts.append(text(MAP_WIDTH - 46, top + cell / 2 + 4, f"{last:.3g}", "tick"))
    bottom = TOP + down * cell
    parts.append(text(x.start, bottom + 17, f"step {short(rows[0][0])}", "tick"))
    parts.append(text(x.end, bottom + 17, short(rows[-1][0]), "tick", "end"))
    parts.append(text(x.end + 8, bottom + 17, "at the end", "tick"))
    return picture(MAP_WIDTH, height, parts, words)


def _cells(table: Sequence[Sequence[float]], x: Scale, cell: float, highest: float) -> list[str]:
    """One path a shade; neighbours of the same shade are one stretch of it."""
    across, down = len(table), len(table[0])
    paths: dict[int, list[str]] = {}
    for row in range(down):
        shades = [min(round(LEVELS * max(c[row], 0.0) / highest), LEVELS) for c in table]
        start = 0
        for column in range(1, across + 1):
            if column < across and shades[column] == shades[start]:
                continue
            left, width = x(start), x(column) - x(start)
            top = TOP + row * cell
            if shades[start]:
                stretch = f"M{left:.1f} {top:.1f}h{width:.1f}v{cell:.1f}h{-width:.1f}z"
                paths.setdefault(shades[start], []).append(stretch)
            start = column
    return [
        tag("path", d="".join(stretches), class_="heat", fill_opacity=shade / LEVELS)
        for shade, stretches in sorted(paths.items())
    ]


def _shrunk(table: list[list[float]]) -> list[list[float]]:
    """At most `COLUMNS` steps by `ROWS` entries, by means over neighbours."""
    columns = _groups(table, COLUMNS)
    steps = [[sum(v) / len(v) for v in zip(*group, strict=True)] for group in columns]
    return [[sum(group) / len(group) for group in _groups(row, ROWS)] for row in steps]


def _groups(items: list[Item], most: int) -> list[list[Item]]:
    """At most `most` groups of neighbours, of nearly equal size."""
    count = min(len(items), most)
    edges = [round(i * len(items) / count) for i in range(count + 1)]
    return [items[a:b] for a, b in pairwise(edges)]
