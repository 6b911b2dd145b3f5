"""Draw runs' loss curves as one SVG: thin lines for training, dots for held-out loss.

python -m benchmarks.curves docs/pictures/curves.svg runs/one runs/two
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 360, 56, 44, 16
COLOURS = ("#3465a4", "#cc5500", "#4e9a06", "#75507b", "#a40000")


@dataclass
class Curve:
    """One run: (step, loss) of training, smoothed, and of the held-out set."""

    name: str
    training: list[tuple[float, float]]
    held_out: list[tuple[float, float]]


def read(folder: Path, smoothing: float = 0.9) -> Curve:
    """The curve of a run's folder.

    Raises:
        UserError: if the folder has no metrics.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder of a run")
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    training, mean, weight = [], 0.0, 0.0
    for row in rows:
        mean = smoothing * mean + (1 - smoothing) * row["loss"]
        weight = smoothing * weight + (1 - smoothing)
        training.append((float(row["step"]), mean / weight))
    held = [(float(r["step"]), float(r["val/loss"])) for r in rows if "val/loss" in r]
    return Curve(folder.name, training, held)


def draw(curves: list[Curve]) -> str:
    """The SVG's text."""
    points = [p for curve in curves for p in curve.training + curve.held_out]
    last = max(step for step, _ in points)
    low = min(loss for _, loss in points)
    # The first steps are far above everything else; the scale leaves out a fortieth of them.
    high = max(loss for step, loss in points if step >= last / 40)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 150) * step / last

    def y(loss: float) -> float:
        share = (min(loss, high) - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in range(6):
        loss, step = low + (high - low) * tick / 5, last * tick / 5
        parts.append(
            f'<line x1="{LEFT}" x2="{x(last):.1f}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" '
            'stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>'
            f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.0f}'
            "</text>"
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">step; loss in nats, dots held out</text>')
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve.training)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for step, loss in curve.held_out:
            parts.append(f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="4" fill="{colour}"/>')
        if curve.held_out:
            step, loss = curve.held_out[-1]
            parts.append(
                f'<text x="{x(step) + 10:.1f}" y="{y(loss) + 4:.1f}" fill="{colour}">{loss:.3f}'
                "</text>"
            )
        parts.append(
            f'<text x="{WIDTH - 300}" y="{TOP + 18 + 18 * index}" fill="{colour}">{curve.name}'
            "</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: list[str]) -> int:
    """Draw; the exit code."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    target = Path(arguments[0])
    try:
        text = draw([read(Path(folder)) for folder in arguments[1:]])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
