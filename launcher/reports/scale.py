"""Numbers for people, and scales that map values to places in a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def short(value: float) -> str:
    """Three or four digits: 0.00012, 1.234, 12.3k, 4.57M."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.3g}{letter}"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.2e}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(length: float) -> str:
    """A time from microseconds to days: 12 ms, 3.4 s, 2 h 5 min."""
    if length < 1:
        return f"{length * 1e6:.0f} µs" if length < 1e-3 else f"{length * 1e3:.3g} ms"
    if length < 60:
        return f"{length:.1f} s"
    minutes, rest = divmod(round(length), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from `low` to `high`, about `count` of them."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


class Scale:
    """Maps `low … high` to `start … end`, linearly or by logarithm; values beyond are held in."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        if high <= low:  # one value only: let it stand in the middle
            room = abs(low) * 0.1 or 1.0
            low, high = (low / 2, low * 2) if log else (low - room, high + room)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share

    def ticks(self, count: int = 5) -> list[float]:
        """Where to draw grid lines."""
        if not self.log:
            return ticks(self.low, self.high, count)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = max(1, round((last - first) / count))
        steps = (1,) if last - first > 2 else (1, 2, 5)
        found = [m * 10.0**n for n in range(first, last + 1, every) for m in steps]
        return [value for value in found if self.low <= value <= self.high]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """An exponential mean that forgets over `window` values, right from the first one on."""
    keep = 1 - 1 / max(window, 1)
    mean = weight = 0.0
    found = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight)
    return found


def binned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: means over equal numbers of neighbours."""
    if len(points) <= most:
        return [(float(x), y) for x, y in points]
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]
