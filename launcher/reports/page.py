"""The page: head, curves, layers, timeline, events, config; each part with what it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from shlex import quote

import yaml

from launcher.reports import facts
from launcher.reports.curves import curves
from launcher.reports.layers import layer_charts
from launcher.reports.run import Run
from launcher.reports.scale import seconds, size
from launcher.reports.style import STYLE
from launcher.reports.timeline import (
    place_name,
    share,
    shown_ranks,
    timeline_picture,
    used_colours,
)

MOST_CARDS = 24
"""Pictures of layers that are open; more are folded away."""


def page(run: Run) -> str:
    """The whole page as HTML, with everything it needs inside."""
    parts = [_head(run), _curves(run), _layers(run), _timeline(run), _events(run), _config(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _head(run: Run) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for what, value in facts.tiles(run)
    )
    rows = [*facts.setup(run), *((name, value) for name, value in facts.versions(run))]
    table = _table([], [(escape(name), escape(value)) for name, value in rows])
    lacks = []
    if not run.summary:
        lacks.append(
            "There is no summary.json, which holds parameter counts, versions and wall time: it is "
            f"written when a run ends or is stopped. {_command(f'manyforms resume {_place(run)}')}"
        )
    if not run.config:
        lacks.append("There is no config.yaml that can be read, so the setup is not shown.")
    head = f'<h1>{escape(run.name)}</h1><p class="sub">{escape(facts.ending(run))}</p>'
    setup = f'<h2>Setup</h2><div class="card">{table}</div>' if rows else ""
    return f'<header>{head}</header><div class="tiles">{tiles}</div>{_notes(lacks)}{setup}'


def _curves(run: Run) -> str:
    charts = curves(run)
    known = {name.removeprefix("val/") for name in run.scalars()}
    lacks = []
    if not run.records:
        lacks.append(
            "No step has been logged: metrics.jsonl is missing or empty. The run has not come to "
            "its first step; log.txt in its folder says how far it came."
        )
    else:
        if "val/loss" not in run.scalars():
            again = _resume(run, "train.validate_every=50")
            lacks.append(f"No held-out values: none was measured yet. {again}")
        language = (run.config.get("model") or {}).get("kind", "language") == "language"
        if "val/loss" in run.scalars() and language and "bits_per_byte" not in known:
            lacks.append(
                "No bits per byte: the objective is not next-token prediction, for which alone it "
                "is defined."
            )
        if "memory_gb" not in known:
            lacks.append("No memory: this run was recorded without it.")
    legend = _legend(
        [("p-forward", "training, smoothed over its noise")]
        + ([("a-tp", "held out")] if any(n.startswith("val/") for n in run.scalars()) else [])
        + ([("p-other", "▲ saved")] if any(e.get("event") == "save" for e in run.events) else [])
    )
    return f"<h2>Curves</h2>{legend if charts else ''}{_cards(charts)}{_notes(lacks)}"


def _layers(run: Run) -> str:
    charts, lacks = layer_charts(run), []
    layers = run.layers()
    if run.records and ("residual", "rms") not in layers:
        again = _resume(run, "train.layer_norms=true")
        lacks.append(f"The size of the hidden state behind each block was not logged. {again}")
    if run.records and not any(mechanism != "residual" for mechanism, _ in layers):
        lacks.append(
            "No mechanism of this model reports anything of its layers. Those that route tokens "
            "do: a mixture of experts its load, its router's entropy and what it drops. "
            "<code>manyforms zoo</code>"
        )
    words = "<p>Heat maps run from 0, the ground's colour, to the highest value of all layers.</p>"
    shown = words if any(", layer" in words for words, _, _ in charts) else ""
    more = charts[MOST_CARDS:]
    rest = f"<details><summary>{len(more)} more</summary>{_cards(more)}</details>" if more else ""
    return f"<h2>Layer by layer</h2>{shown}{_cards(charts[:MOST_CARDS])}{rest}{_notes(lacks)}"


def _timeline(run: Run) -> str:
    if not run.timelines:
        step = min(20, int((run.config.get("train") or {}).get("steps") or 20))
        command = _command(
            f"manyforms train {_place(run)}/config.yaml run.dir=… train.timeline={step}"
        )
        lack = f"No step was recorded, so there is no timeline. {command}"
        return f"<h2>One step, rank by rank</h2>{_notes([lack])}"
    shown = shown_ranks(run.timelines)
    first = run.timelines[0]
    legend = _legend(used_colours(shown))
    wide = timeline_picture(shown).replace("<svg ", '<svg class="wide" ', 1)
    rows = []
    for timeline in shown:
        sums = share(timeline["spans"])
        messages = "; ".join(
            f"{count} × {operation.replace('_', '-')} on {axis}, {size(total)}"
            for (operation, axis), (count, total) in sorted(sums.messages.items())
        )
        hidden = f"{sums.hidden / sums.sending:.0%}" if sums.sending else "–"
        rows.append(
            (
                f"{timeline['rank']}{escape(place_name(timeline, ' ({})'))}",
                seconds(sums.step),
                _share(sums.computing, sums.step),
                _share(sums.waiting, sums.step),
                seconds(sums.sending) if sums.sending else "–",
                hidden,
                size(timeline["memory"]) if "memory" in timeline else "–",
                escape(messages) or "none",
            )
        )
    heads = ["rank", "step", "computing", "waiting", "messages under way", "beside computing",
             "peak memory", "messages, their bytes on this rank"]  # fmt: skip
    some = (
        f", {len(shown)} of {len(run.timelines)} ranks" if len(shown) < len(run.timelines) else ""
    )
    world = int(first.get("world", 1))
    missing = max(world - len(run.timelines), 0)
    lacks = (
        [f"Of {missing} of {world} ranks there is no recording in timeline/."] if missing else []
    )
    words = (
        f"Step {first['step']}{some}. Above, what each rank computed (darker and lighter blocks "
        "alternate) and when it waited; below, its messages under way. Recording makes a step "
        "slower than the others."
    )
    return (
        f'<h2>One step, rank by rank</h2><p>{words}</p>{legend}<div class="card">{wide}</div>'
        f'<div class="card" style="margin-top:14px">{_table(heads, rows)}</div>{_notes(lacks)}'
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _events(run: Run) -> str:
    rows = []
    for when, kind, step, words in facts.event_rows(run):
        bad = kind not in ("start", "resume", "stop", "end") and "save" not in kind
        shown = f'<span class="bad">{escape(kind)}</span>' if bad else escape(kind)
        rows.append((when, shown, escape(step), escape(words)))
    if not rows:
        return f"<h2>Events</h2>{_notes(['events.jsonl is missing or empty.'])}"
    table = _table(["when", "event", "step", ""], rows)
    return f'<h2>Events</h2><div class="card">{table}</div>'


def _config(run: Run) -> str:
    if not run.config:
        return ""
    text = escape(yaml.safe_dump(run.config, sort_keys=False, width=100))
    whole = (
        f"<details><summary>config.yaml, resolved</summary><pre><code>{text}</code></pre></details>"
    )
    return f'<h2>Config</h2><div class="card">{whole}</div>'


def _cards(charts: Iterable[tuple[str, str, str]]) -> str:
    cards = "".join(
        f'<div class="card"><h3>{escape(name)}<span>{escape(unit)}</span></h3>{drawing}</div>'
        for name, unit, drawing in charts
    )
    return f'<div class="cards">{cards}</div>' if cards else ""


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<span><i class="{name}"></i>{escape(words)}</span>' for name, words in entries
    )
    return f'<div class="legend">{items}</div>'


def _notes(lacks: Iterable[str]) -> str:
    """What is not there and how to get it; HTML."""
    return "".join(f'<div class="card note">{lack}</div>' for lack in lacks)


def _table(heads: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<table>{f'<thead><tr>{head}</tr></thead>' if heads else ''}<tbody>{body}</tbody></table>"
    )


def _place(run: Run) -> str:
    return quote(str(run.folder))


def _resume(run: Run, setting: str) -> str:
    """The command that goes on with a setting; a run that is done needs more steps."""
    planned = (run.config.get("train") or {}).get("steps")
    more = f" train.steps={2 * run.steps}" if planned == run.steps else ""
    return _command(f"manyforms resume {_place(run)} {setting}{more}")


def _command(words: str) -> str:
    return f"<code>{escape(words)}</code>"
