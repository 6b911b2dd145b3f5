"""The picture of `benchmarks.ladder`: times of a training step, and the share that is hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 300, 48, 16, 40, 44
MODE_COLOURS = {"standard": "#cc5500", "ladder": "#3465a4", "none": "#555753"}
PASS_COLOURS = {"training step": "#3465a4", "forward": "#4e9a06"}
GOAL = 0.6


class Row(Protocol):
    """What the picture needs of a row of the table."""

    kind: str
    rate: int

    def median(self, mode: str) -> float: ...
    @property
    def hidden(self) -> list[float]: ...


class Panel:
    """Axes over rates (logarithmic) and a range from zero."""

    def __init__(self, left: float, title: str, rates: Sequence[int], top: float):
        self.left, self.top = left, top
        self.low, self.high = math.log(min(rates)), math.log(max(rates))
        self.parts = [f'<text x="{left + LEFT}" y="22" font-size="13">{title}</text>']
        for rate in rates:
            self._text(self.x(rate), HEIGHT - BOTTOM + 18, f"{rate}", "middle")

    def x(self, rate: float) -> float:
        share = (math.log(rate) - self.low) / ((self.high - self.low) or 1.0)
        return self.left + LEFT + 10 + (WIDTH - LEFT - RIGHT - 20) * share

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self.top

    def _text(self, x: float, y: float, text: str, anchor: str, colour: str = "black") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
        )

    def ticks(self, values: Sequence[float], written: Callable[[float], str]) -> None:
        for value in values:
            start, end, y = self.left + LEFT, self.left + WIDTH - RIGHT, self.y(value)
            self.parts.append(
                f'<line x1="{start}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            )
            self._text(start - 6, y + 4, written(value), "end")

    def line(self, points: list[tuple[int, float]], colour: str) -> None:
        path = " ".join(f"{self.x(rate):.1f},{self.y(value):.1f}" for rate, value in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for rate, value in points:
            self.parts.append(
                f'<circle cx="{self.x(rate):.1f}" cy="{self.y(value):.1f}" r="3" fill="{colour}"/>'
            )

    def bar(self, rate: int, low: float, high: float, colour: str) -> None:
        x = self.x(rate)
        self.parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.y(low):.1f}" y2="{self.y(high):.1f}" '
            f'stroke="{colour}"/>'
        )

    def legend(self, names: dict[str, str], row: int) -> None:
        for index, (name, colour) in enumerate(names.items()):
            self._text(self.left + WIDTH - RIGHT, TOP + 14 * (row + index), name, "end", colour)


def draw(rows: Sequence[Row]) -> str:
    """The SVG's text."""
    rates = sorted({row.rate for row in rows})
    steps = sorted((r for r in rows if r.kind == "training step"), key=lambda row: row.rate)
    longest = max(row.median("standard") for row in steps)
    unit = 10 ** math.floor(math.log10(longest))
    top = unit * math.ceil(longest / unit)
    times = Panel(0, "a training step, ms", rates, top)
    times.ticks([top * tick / 4 for tick in range(5)], lambda value: f"{value:.0f}")
    for mode, colour in MODE_COLOURS.items():
        times.line([(row.rate, row.median(mode)) for row in steps], colour)
    names = {("no communication" if m == "none" else m): c for m, c in MODE_COLOURS.items()}
    times.legend(names, 1)
    shares = Panel(WIDTH, "share of communication hidden", rates, 1.0)
    shares.ticks([0, 0.2, 0.4, GOAL, 0.8, 1.0], lambda value: f"{100 * value:.0f}%")
    for kind, colour in PASS_COLOURS.items():
        points = sorted((r for r in rows if r.kind == kind), key=lambda row: row.rate)
        shares.line([(row.rate, row.hidden[1]) for row in points], colour)
        for row in points:
            shares.bar(row.rate, row.hidden[0], row.hidden[2], colour)
    shares.legend(PASS_COLOURS, 1)
    for panel in (times, shares):
        panel._text(panel.left + WIDTH / 2 + 16, HEIGHT - 8, "Mbit/s each way", "middle")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{2 * WIDTH}" height="{HEIGHT}" fill="white"/>',
            *times.parts,
            *shares.parts,
            "</svg>\n",
        ]
    )
