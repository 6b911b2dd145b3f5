"""The few shapes that charts are made of, as SVG text. Colours are classes of the page's style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from launcher.reports.scale import Scale, short

Place = tuple[float, float]


def tag(name: str, content: str = "", /, **attributes: str | float) -> str:
    """An element; `class_` is `class`, and an underscore in a name a hyphen."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{words}>{content}</{name}>" if content else f"<{name}{words}/>"


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> str:
    return tag("text", escape(words), x=x, y=y, class_=class_, text_anchor=anchor)


def title(words: str) -> str:
    """What is shown when the pointer rests on the element around it."""
    return f"<title>{escape(words)}</title>"


def line(points: Iterable[Place], class_: str, **more: str | float) -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=path, class_=class_, **more)


def picture(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """An image that fills the width it is given."""
    inner = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{inner}</svg>"
    )


def axes(x: Scale, y: Scale, shown: int = 4) -> list[str]:
    """Grid lines across, numbers at the left and below."""
    left, right, bottom = x.start, x.end, y.start
    parts = []
    for value in y.ticks(shown):
        at = y(value)
        parts.append(tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(text(left - 7, at + 4, short(value), "tick", "end"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="base"))
    for value in x.ticks(6):
        if value == int(value):
            parts.append(text(x(value), bottom + 17, short(value), "tick", "middle"))
    return parts
