"""One step as every rank spent it: computing and waiting above, messages on their way below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.reports.scale import Scale, seconds, size
from launcher.reports.svg import picture, tag, text, title

WIDTH, LEFT, RIGHT, TOP = 1160, 96, 32, 8
LANE, THIN, GAP = 22, 9, 16
"""Heights: of the lane of computing, of one of messages, between ranks."""
MOST_RANKS = 16
"""Ranks shown; of more, so many spread evenly."""
MOST_LANES = 3
"""Lanes of messages under a rank; what does not fit is drawn over others."""
AXES = ("tp", "fsdp", "replicate", "ep", "cp", "pp")
"""In the order of their colours; other axes and pairs of axes have a colour in common."""
PHASES = ("forward", "backward", "update", "data")
Span = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """Where a rank's step went, in seconds; `hidden` is the part of `sending` beside computing."""

    step: float
    computing: float
    waiting: float
    sending: float
    hidden: float
    messages: dict[tuple[str, str], tuple[int, int]]
    """(operation, axis) → how many, their bytes."""


def share(spans: Sequence[Span]) -> Share:
    """Add up a rank's spans."""
    found: dict[str, list[tuple[float, float]]] = {"compute": [], "wait": [], "collective": []}
    messages: dict[tuple[str, str], tuple[int, int]] = {}
    for span in spans:
        found[span["kind"]].append((span["start"], span["end"]))
        if span["kind"] == "collective":
            key = (span["name"], span.get("axis", "?"))
            count, total = messages.get(key, (0, 0))
            messages[key] = (count + 1, total + span.get("bytes", 0))
    compute, sending = joined(found["compute"]), joined(found["collective"])
    return Share(
        max((span["end"] for span in spans), default=0.0),
        _length(compute),
        _length(joined(found["wait"])),
        _length(sending),
        _length(common(compute, sending)),
        messages,
    )


def joined(parts: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times without overlaps, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(parts):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def common(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """When both are, each without overlaps and in order."""
    found, at = [], 0
    for start, end in one:
        while at < len(other) and other[at][1] <= start:
            at += 1
        for first, last in other[at:]:
            if first >= end:
                break
            found.append((max(start, first), min(end, last)))
    return found


def _length(parts: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in parts)


def shown_ranks(timelines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All of them, or `MOST_RANKS` spread evenly."""
    if len(timelines) <= MOST_RANKS:
        return list(timelines)
    return [timelines[i * len(timelines) // MOST_RANKS] for i in range(MOST_RANKS)]


def place_name(timeline: dict[str, Any], form: str = "{}") -> str:
    """Where a rank stands on the axes, `fsdp 1, tp 1`, put into `form`; empty if it is alone."""
    words = ", ".join(f"{axis} {index}" for axis, index in timeline.get("place", {}).items())
    return form.format(words) if words else ""


def timeline_picture(timelines: Sequence[dict[str, Any]]) -> str:
    """All shown ranks over one time axis."""
    end = max(span["end"] for timeline in timelines for span in timeline["spans"])
    unit, name = (1.0, "s") if end >= 2 else (1e3, "ms")
    x = Scale(0.0, end * unit, LEFT, WIDTH - RIGHT)
    parts, top = [], float(TOP)
    for timeline in timelines:
        messages = [s for s in timeline["spans"] if s["kind"] == "collective"]
        lanes = _lanes(messages)
        parts.append(text(0, top + 15, f"rank {timeline['rank']}", "rank"))
        parts.append(text(0, top + 29, place_name(timeline), "tick"))
        parts.append(_ground(x, top, LANE))
        for span in timeline["spans"]:
            if span["kind"] != "collective":
                parts.append(_box(span, x, unit, top, LANE))
        for number in range(max(lanes.values(), default=-1) + 1):
            parts.append(_ground(x, top + LANE + 3 + number * (THIN + 2), THIN))
        for index, lane in lanes.items():
            parts.append(_box(messages[index], x, unit, top + LANE + 3 + lane * (THIN + 2), THIN))
        top += LANE + 3 + max(max(lanes.values(), default=0) + 1, 1) * (THIN + 2) + GAP
    grid = []
    for value in x.ticks(10):
        label = f"{value:g} {name}"
        grid.append(tag("line", x1=x(value), x2=x(value), y1=TOP, y2=top - GAP + 4, class_="grid"))
        grid.append(text(x(value), top + 4, label, "tick", "middle" if value else "start"))
    return picture(WIDTH, top + 12, [*_hatch(), *grid, *parts], "Timeline of one step per rank")


def _lanes(messages: Sequence[Span]) -> dict[int, int]:
    """Message → lane, so that those under way at once lie below each other."""
    until = [0.0] * MOST_LANES
    found = {}
    for index, span in enumerate(messages):
        lane = next((n for n in range(MOST_LANES) if until[n] <= span["start"]), MOST_LANES - 1)
        found[index] = lane
        until[lane] = max(until[lane], span["end"])
    return found


def _ground(x: Scale, top: float, height: float) -> str:
    return tag("rect", x=x.start, y=top, width=x.end - x.start, height=height, class_="ground")


def _box(span: Span, x: Scale, unit: float, top: float, height: float) -> str:
    left, right = x(span["start"] * unit), x(span["end"] * unit)
    words = f"{span['name'].replace('_', ' ')}, {seconds(span['end'] - span['start'])}"
    if span["kind"] == "collective":
        words += f", {span.get('axis', 'axis not known')}"
        words += f", {size(span['bytes'])}" if "bytes" in span else ""
    return tag("rect", title(words), x=left, y=top, height=height,
               width=max(right - left, 0.4), class_=colour(span))  # fmt: skip


def colour(span: Span) -> str:
    """The class that colours a span: by phase, or by axis."""
    if span["kind"] == "wait":
        return "wait"
    if span["kind"] == "compute":
        phase, _, block = span["name"].partition(" ")
        if phase not in PHASES:
            return "p-other"
        odd = " odd" if block.isdigit() and int(block) % 2 else ""
        return f"p-{phase}{odd}"
    axis = span.get("axis")
    return f"a-{axis}" if axis in AXES else "a-other"


def _hatch() -> list[str]:
    """The pattern of waiting."""
    stripe = tag("line", x1=0, y1=0, x2=0, y2=6, class_="stripe")
    pattern = (
        '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)">{stripe}</pattern>'
    )
    return [f"<defs>{pattern}</defs>"]


def used_colours(timelines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(class, words) of what occurs, for the legend."""
    spans = [span for timeline in timelines for span in timeline["spans"]]
    classes = {colour(span).split()[0] for span in spans}
    words = [(f"p-{phase}", phase) for phase in PHASES]
    words += [("p-other", "loss, norm, other"), ("wait", "waiting")]
    words += [(f"a-{axis}", f"messages: {axis}") for axis in AXES]
    words += [("a-other", "messages: several axes, or not known")]
    return [(name, meaning) for name, meaning in words if name in classes]
