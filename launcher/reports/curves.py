"""Metrics over the steps: one chart each, training and held-out values together, with events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.reports.run import Points, Run
from launcher.reports.scale import Scale, binned, short, smooth
from launcher.reports.svg import axes, line, picture, tag, text, title

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 230, 56, 72, 14, 26
MOST = 500
"""Points of a line; more are averaged."""
HINTS = 100
"""Places along a chart that show numbers under the pointer."""


@dataclass(frozen=True)
class Kind:
    """How a metric is shown."""

    title: str
    unit: str = ""
    log: bool = False
    smooth: bool = False


KNOWN = {
    "loss": Kind("Loss", "nats", smooth=True),
    "bits_per_byte": Kind("Bits per byte", "of held-out text"),
    "accuracy": Kind("Accuracy", "share of targets", smooth=True),
    "learning_rate": Kind("Learning rate"),
    "grad_norm": Kind("Gradient norm", "before clipping, logarithmic", log=True, smooth=True),
    "tokens_per_second": Kind("Throughput", "tokens a second", smooth=True),
    "images_per_second": Kind("Throughput", "images a second", smooth=True),
    "tflops_per_device": Kind("Arithmetic", "10¹² operations a second and device", smooth=True),
    "mfu": Kind("Model FLOPs utilisation", "share of the device's peak", smooth=True),
    "memory_gb": Kind("Peak memory of rank 0", "GB so far"),
    "auxiliary_loss": Kind("Auxiliary losses", "summed and weighted", smooth=True),
}
"""Those with words of their own, in the order of the page; any other is drawn under its name."""
COUNTERS = {"tokens", "images"}
"""Straight lines, which show nothing."""


def curves(run: Run) -> list[tuple[str, str, str]]:
    """Title, unit and chart of every metric that belongs to no layer."""
    names = {name.removeprefix("val/"): None for name in run.scalars()}
    # What a mechanism reports of a layer has its own section, its held-out values too.
    own = [name for name in names if name not in COUNTERS and name.count("/") < 2]
    order = [name for name in KNOWN if name in own] + [name for name in own if name not in KNOWN]
    marks = event_marks(run)
    return [
        (kind.title, kind.unit, chart(kind, run.points(name), run.points(f"val/{name}"), marks))
        for name in order
        for kind in [KNOWN.get(name, Kind(name.replace("_", " "), smooth=True))]
    ]


def event_marks(run: Run) -> list[tuple[int, str]]:
    """(step, event) of what is marked on the curves: all but a run's ordinary start and end."""
    known = [(e.get("step"), str(e.get("event", "?"))) for e in run.events]
    return [(s, kind) for s, kind in known if isinstance(s, int) and kind not in ("start", "end")]


def chart(
    kind: Kind, training: Points, held_out: Points, marks: Sequence[tuple[int, str]] = ()
) -> str:
    """Training as a line (its noise in the background), held-out values as dots on a line."""
    training = [(s, v) for s, v in training if not kind.log or v > 0]
    held_out = [(s, v) for s, v in held_out if not kind.log or v > 0]
    steps = [step for step, _ in training + held_out]
    last = max(steps)
    x = Scale(min(0, *steps) if len(steps) > 1 else 0, last, LEFT, WIDTH - RIGHT)
    low, high = _range(training, held_out, last, kind.log)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, kind.log)
    parts = axes(x, y) + [_mark(x(step), what, step) for step, what in marks if step <= last]
    if training:
        dots = binned(training, MOST)
        held = [value for _, value in dots]
        drawn = smooth(held, max(len(held) // 40, 1)) if kind.smooth and len(held) > 20 else held
        if drawn is not held:
            parts.append(line([(x(s), y(v)) for s, v in dots], "noise"))
        parts.append(
            line([(x(s), y(v)) for (s, _), v in zip(dots, drawn, strict=True)], "training")
        )
        parts += _hints(x, y, training)
    ends = [(y(drawn[-1]), drawn[-1], "training")] if training else []
    if held_out:
        dots = binned(held_out, MOST)
        parts.append(line([(x(s), y(v)) for s, v in dots], "held"))
        if len(dots) <= 60:
            parts += [
                tag("circle", title(f"held out, step {s:.0f}: {short(v)}"), cx=x(s), cy=y(v),
                    r=3.5, class_="held")
                for s, v in dots
            ]  # fmt: skip
        ends.append((y(held_out[-1][1]), held_out[-1][1], "held"))
    parts += _end_labels(ends, WIDTH - RIGHT + 8)
    return picture(WIDTH, HEIGHT, parts, kind.title)


def _range(training: Points, held_out: Points, last: int, log: bool) -> tuple[float, float]:
    """The values to show; the first steps' peak, far above everything later, is cut off."""
    later = [v for s, v in training if s >= last / 40] or [v for _, v in training]
    values = later + [v for _, v in held_out]
    low, high = min(values), max(values)
    if not log:
        room = (high - low) * 0.05
        # Close enough to zero, the scale begins there.
        low = 0.0 if 0 <= low < 0.25 * high else low - room
        high += room
    return low, high


def _mark(at: float, kind: str, step: int) -> str:
    """A save is a small triangle on the axis; anything else a line across the chart."""
    bottom = HEIGHT - BOTTOM
    if kind == "save":
        shape = f"{at - 4:.1f},{bottom + 7} {at + 4:.1f},{bottom + 7} {at:.1f},{bottom + 1}"
        return tag("polygon", title(f"saved after step {step}"), points=shape, class_="save")
    bad = "bad" if kind not in ("resume", "stop") else ""
    return tag(
        "g",
        title(f"{kind} at step {step}")
        + tag("line", x1=at, x2=at, y1=TOP, y2=bottom, class_=f"event {bad}")
        + text(at + 3, TOP + 8, kind, f"event {bad}"),
    )


def _hints(x: Scale, y: Scale, points: Points) -> list[str]:
    """Invisible strips that show a step's value under the pointer."""
    shown = points if len(points) <= HINTS else points[:: -(-len(points) // HINTS)]
    width = (x.end - x.start) / max(len(shown), 1)
    return [
        tag("rect", title(f"step {step}: {short(value)}"), x=x(step) - width / 2, y=TOP,
            width=width, height=HEIGHT - BOTTOM - TOP, class_="hint")
        for step, value in shown
    ]  # fmt: skip


def _end_labels(ends: list[tuple[float, float, str]], x: float) -> list[str]:
    """The last values beside the lines' ends, moved apart where they would touch."""
    ends = sorted(ends)
    placed: list[float] = []
    for at, _, _ in ends:
        placed.append(max(at, placed[-1] + 14) if placed else at)
    return [
        text(x, min(at, HEIGHT - BOTTOM) + 4, short(value), f"end {class_}")
        for at, (_, value, class_) in zip(placed, ends, strict=True)
    ]
