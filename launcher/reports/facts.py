"""What a run was and came to, in words and numbers: the head of the page, events, memory."""

from __future__ import annotations

import time
from typing import Any

from launcher.reports.run import Run
from launcher.reports.scale import seconds, short

DULL = {"time", "event", "step"}
"""Facts of an event that have columns of their own."""


def tiles(run: Run) -> list[tuple[str, str]]:
    """(what, value) of the final figures there are."""
    last = run.records[-1] if run.records else {}
    held_out = _last_held_out(run)
    rate = next((n for n in ("tokens_per_second", "images_per_second") if n in last), None)
    counts = run.summary.get("counts", {})
    found = [
        ("held-out loss, nats", held_out.get("loss")),
        ("held-out bits per byte", held_out.get("bits_per_byte")),
        ("held-out accuracy", held_out.get("accuracy")),
        ("training loss, nats", last.get("loss")),
        (f"steps{_planned(run)}", run.steps or None),
        ("parameters", counts.get("parameters")),
        ("of them active", _different(counts)),
        (
            rate.replace("_per_second", " a second") if rate else "",
            last.get(rate) if rate else None,
        ),
    ]
    shown = [(what, _figure(what, value)) for what, value in found if value is not None]
    length = run.summary.get("seconds")
    return shown + ([("wall time", seconds(length))] if length is not None else [])


def _figure(what: str, value: Any) -> str:
    if "accuracy" in what:
        return f"{value:.2%}"
    return f"{value:,}" if what.startswith("steps") else short(float(value))


def _planned(run: Run) -> str:
    planned = (run.config.get("train") or {}).get("steps")
    return f" of {planned:,}" if isinstance(planned, int) and planned != run.steps else ""


def _different(counts: dict[str, Any]) -> Any:
    active = counts.get("active_parameters")
    return active if active != counts.get("parameters") else None


def _last_held_out(run: Run) -> dict[str, Any]:
    """The last held-out values that were logged."""
    found: dict[str, Any] = {}
    for record in run.records:
        found |= {k.removeprefix("val/"): v for k, v in record.items() if k.startswith("val/")}
    return found


def ending(run: Run) -> str:
    """How the run stands, in one sentence."""
    last = run.events[-1] if run.events else {}
    if last.get("event") == "end":
        return f"Ran to its end at step {last.get('step')}."
    if last.get("event") == "stop":
        return f"Stopped by {last.get('signal')} after step {last.get('step')}."
    if last.get("event") == "failure":
        return f"Failed: {last.get('cause')}"
    return f"Not ended: the last thing known is step {run.steps}."


def setup(run: Run) -> list[tuple[str, str]]:
    """(section, words) of the config, on a line each."""
    config = run.config
    model, data = config.get("model") or {}, config.get("data") or {}
    train, parallel = config.get("train") or {}, config.get("parallel") or {}
    lines = []
    if model:
        sizes = [
            f"{key} {model[key]}" for key in ("dim", "depth", "vocab", "patch") if model.get(key)
        ]
        lines.append(("model", ", ".join([str(model.get("kind", "")), *sizes])))
    blocks = model.get("block") or []
    for number, block in enumerate(blocks if isinstance(blocks, list) else [blocks]):
        slots = ("norm", "placement", "residual", "mixer", "cross", "position", "feedforward")
        words = [f"{slot} {_part(block[slot])}" for slot in slots if block.get(slot)]
        lines.append(("block" if len(blocks) == 1 else f"block {number + 1}", ", ".join(words)))
    if data:
        sources = data.get("sources") or []
        names = ", ".join(map(_part, sources if isinstance(sources, list) else [sources]))
        more = f", sequence {data['sequence']}" if model.get("kind") == "language" else ""
        lines.append(("data", names + more))
    if train:
        words = [
            f"{train.get('steps')} steps of {train.get('global_batch')} samples",
            f"{_part(train.get('optimizer'))}, lr {(train.get('optimizer') or {}).get('lr')}"
            if isinstance(train.get("optimizer"), dict)
            else str(train.get("optimizer")),
            f"schedule {_part(train.get('schedule'))}",
            str(train.get("precision", "")),
        ]
        lines.append(("training", ", ".join(word for word in words if word)))
    axes = [f"{axis} {n}" for axis in ("pp", "replicate", "fsdp", "ep", "cp", "tp")
            if (n := parallel.get(axis, 1)) != 1]  # fmt: skip
    if parallel:
        engine = _part(parallel.get("engine", "native"))
        lines.append(("layout", f"engine {engine}, " + (" × ".join(axes) or "one process")))
    return lines


def _part(spec: Any) -> str:
    """A part's name, with the few options that say most."""
    if not isinstance(spec, dict):
        return str(spec)
    telling = ("heads", "kv_heads", "experts", "top_k", "ratio", "width", "window")
    options = [f"{key} {spec[key]}" for key in telling if spec.get(key) is not None]
    return str(spec.get("name", "?")) + (f" ({', '.join(options)})" if options else "")


def versions(run: Run) -> list[tuple[str, str]]:
    """Of what the result may depend on."""
    found = [(name, str(version)) for name, version in run.summary.get("versions", {}).items()]
    for name in ("device", "seed"):
        if name in run.summary:
            found.append((name, str(run.summary[name])))
    return found


def event_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """(when, event, step, facts); runs of saves are one row."""
    rows: list[tuple[str, str, str, str]] = []
    saves: list[int] = []
    for event in [*run.events, {}]:
        if event.get("event") == "save":
            if not saves:
                first = event
            saves.append(int(event.get("step", 0)))
            continue
        if saves:
            steps = ", ".join(map(str, saves if len(saves) <= 8 else [*saves[:7], "…", saves[-1]]))
            rows.append(
                (_when(first), "save" if len(saves) == 1 else f"{len(saves)} saves", steps, "")
            )
            saves = []
        if event:
            facts = [
                f"{key} {value}" if key != "cause" else str(value)
                for key, value in event.items()
                if key not in DULL and value is not None
            ]
            kind, step = str(event.get("event", "?")), str(event.get("step", ""))
            rows.append((_when(event), kind, step, ", ".join(facts)))
    return rows


def _when(event: dict[str, Any]) -> str:
    moment = event.get("time")
    if not isinstance(moment, int | float):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
