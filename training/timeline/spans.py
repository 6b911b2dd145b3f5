"""From a profiler's trace (Chrome's format, microseconds) to the spans of one step.

Three kinds: `compute` (what the device does, named by phase and block), `wait` (nothing to do until
a message is through) and `collective` (a message on its way). The first two never overlap; messages
run beside them.

On the CPU the main thread computes, and gloo's threads carry messages. On a GPU kernels compute,
and those of NCCL carry messages.
"""

from __future__ import annotations

import ast
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from training.timeline.messages import (
    BYTES,
    KINDS,
    Axes,
    axis_of,
    kind,
    traced_bytes,
    traced_elements,
)

BLOCK = "block: "
"""Begins the mark around a block's forward pass; its number follows."""
STEP = "step: "
"""Begins the mark around a phase of the step; its name follows."""
_BACKWARD = "autograd::engine::evaluate_function"
_PAUSE = 20.0
"""Microseconds without an operation that count as waiting if a message ends in them."""
Event = dict[str, Any]


@dataclass
class Span:
    """start, end: seconds since the step began. bytes: of this rank's input to a collective."""

    kind: str
    name: str
    start: float
    end: float
    axis: str | None = None
    bytes: int | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON: microsecond precision, and only what is known."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return known | {"start": round(self.start, 7), "end": round(self.end, 7)}


def spans(events: list[Event], axes: Axes) -> list[Span]:
    """The spans of the step whose phases are marked in `events`, in order of their starts."""
    events = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in events if event["name"].startswith(STEP)]
    if not marks:
        return []
    first, last = min(e["ts"] for e in marks), max(_end(e) for e in marks)
    main = marks[0]["tid"]
    inside = [event for event in events if event["ts"] < last and _end(event) > first]
    labels = Labels([e for e in inside if e["cat"] in ("cpu_op", "user_annotation")], main)
    kernels = [event for event in inside if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        found = _on_gpu(kernels, inside, labels, axes)
        # Kernels end after the host has asked for them: the step lasts until the last is done.
        last = max(last, *(span.end for span in found))
    else:
        messages = _gloo_messages(inside, axes)
        waits = _waits([e for e in inside if e["tid"] == main], messages, first, last)
        found = messages + waits + _between(labels.parts(first, last), waits)
    for span in found:
        span.start, span.end = (max(span.start, first) - first) / 1e6, (min(span.end, last) - first)
        span.end /= 1e6
    return sorted((s for s in found if s.end > s.start), key=lambda span: span.start)


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


class Labels:
    """What the host is about at each moment: `forward 3`, `backward 0`, `update`.

    The backward pass of an operation is found by the sequence number that autograd gave it.
    """

    def __init__(self, host: list[Event], main: int):
        own = sorted((e for e in host if e["tid"] == main), key=lambda e: float(e["ts"]))
        self.phases = [(e["ts"], _end(e), e["name"][len(STEP) :]) for e in own if _marks(e, STEP)]
        blocks = [(e["ts"], _end(e), e["name"][len(BLOCK) :]) for e in own if _marks(e, BLOCK)]
        backward = sorted((e for e in host if _marks(e, _BACKWARD)), key=lambda e: float(e["ts"]))
        made: dict[int, str] = {}
        starts = [start for start, _, _ in blocks]
        for event in own:
            at = bisect_right(starts, event["ts"]) - 1
            number = event.get("args", {}).get("Sequence number")
            if number is not None and at >= 0 and event["ts"] < blocks[at][1]:
                made[number] = blocks[at][2]
        self.parts_of: dict[int, list[tuple[float, float, str]]] = {main: []}
        for event in backward:
            block = made.get(event.get("args", {}).get("Sequence number", -1))
            name = "backward" if block is None else f"backward {block}"
            line = self.parts_of.setdefault(event["tid"], [])
            line.append((event["ts"], _end(event), name))
        self.parts_of[main] += [(s, e, f"forward {block}") for s, e, block in blocks]
        for line in self.parts_of.values():
            line.sort()

    def at(self, moment: float, thread: int) -> str:
        """The label of a moment on a thread of the host."""
        line = self.parts_of.get(thread, [])
        index = bisect_right(line, (moment, float("inf"), "")) - 1
        if index >= 0 and moment < line[index][1]:
            return line[index][2]
        phase = next((name for start, end, name in self.phases if start <= moment < end), "other")
        if phase != "model":
            return phase
        # Outside of blocks and of autograd it is what it was before: a head follows its blocks.
        return line[index][2].split()[0] if index >= 0 else "forward"

    def parts(self, first: float, last: float) -> list[Span]:
        """The main thread's time, cut where its label changes."""
        main = min(self.parts_of, key=lambda thread: min(self.parts_of[thread], default=(last,)))
        line = self.parts_of[main]
        cuts = {first, last, *(edge for start, end, _ in self.phases for edge in (start, end))}
        cuts |= {edge for start, end, _ in line for edge in (start, end)}
        found: list[Span] = []
        edges = sorted(cut for cut in cuts if first <= cut <= last)
        for start, end in pairwise(edges):
            label = self.at((start + end) / 2, main)
            short = end - start < _PAUSE and label in ("forward", "backward", "other")
            if found and (found[-1].name == label or short):
                found[-1].end = end  # between two operations Python runs
            else:
                found.append(Span("compute", label, start, end))
        return found


def _marks(event: Event, beginning: str) -> bool:
    return bool(event["name"].startswith(beginning))


def _gloo_messages(events: list[Event], axes: Axes) -> list[Span]:
    """gloo's own spans, under the name of the operation that asked for them.

    gloo carries out a reduce-scatter as an all-reduce, so its own names mislead.
    """
    asked, until = [], -1.0
    for event in sorted(events, key=lambda e: float(e["ts"])):
        name = kind(event["name"]) if event["cat"] == "cpu_op" else None
        if name is not None and event["ts"] >= until:  # not inside another: functional on c10d
            elements = traced_elements(event["name"], event.get("args", {}))
            asked.append((float(event["ts"]), name, elements, axes.take(name, elements)))
            until = _end(event)
    found = []
    carried = [e for e in events if e["name"].startswith("gloo:")]
    for event in sorted(carried, key=lambda e: float(e["ts"])):
        span = Span("collective", event["name"].removeprefix("gloo:"), event["ts"], _end(event))
        span.bytes = traced_bytes(event.get("args", {}))
        elements = traced_elements("", event.get("args", {}))
        for index, (when, name, wanted, axis) in enumerate(asked):
            if when <= event["ts"] and wanted == elements:
                span.name, span.axis = name, axis
                del asked[index]
                break
        found.append(span)
    return found


def _waits(main: list[Event], messages: list[Span], first: float, last: float) -> list[Span]:
    """When the main thread stood still: in `wait_tensor`, or in no operation until a message ended.

    A wait on a work handle leaves no trace but that pause.
    """
    found = [
        Span("wait", "wait", e["ts"], _end(e)) for e in main if e["name"].endswith("::wait_tensor")
    ]
    covered = first
    ends = sorted(message.end for message in messages)
    operations = [event for event in main if event["cat"] == "cpu_op"]
    pauses = []
    for event in sorted(operations, key=lambda e: float(e["ts"])):
        if event["ts"] - covered > _PAUSE:
            pauses.append((covered, float(event["ts"])))
        covered = max(covered, _end(event))
    pauses.append((covered, last))
    for start, end in pauses:
        at = bisect_right(ends, end) - 1
        if at >= 0 and ends[at] - start > _PAUSE:
            found.append(Span("wait", "wait", start, ends[at]))
    return sorted(found, key=lambda span: span.start)


def _between(parts: list[Span], waits: list[Span]) -> list[Span]:
    """The parts without the time that was spent waiting."""
    found = []
    index = 0
    for part in parts:
        start = part.start
        while index < len(waits) and waits[index].end <= start:
            index += 1
        for wait in waits[index:]:
            if wait.start >= part.end:
                break
            if wait.start > start:
                found.append(Span("compute", part.name, start, wait.start))
            start = max(start, wait.end)
        if start < part.end:
            found.append(Span("compute", part.name, start, part.end))
    return found


def _on_gpu(kernels: list[Event], events: list[Event], labels: Labels, axes: Axes) -> list[Span]:
    """Kernels by the label of the operation that launched them; NCCL's as messages."""
    launched = {
        event["args"]["External id"]: event
        for event in events
        if event["cat"] == "cpu_op" and "External id" in event.get("args", {})
    }
    messages: list[Span] = []
    computing: list[Span] = []
    for event in sorted(kernels, key=lambda e: float(e["ts"])):
        start, end = float(event["ts"]), _end(event)
        if "nccl" in event["name"].lower():
            messages.append(_nccl_message(event, axes))
            continue
        source = launched.get(event.get("args", {}).get("External id"))
        label = "other" if source is None else labels.at(source["ts"], source["tid"])
        if computing and computing[-1].name == label and start - computing[-1].end < _PAUSE:
            computing[-1].end = max(end, computing[-1].end)
        else:
            start = max(start, computing[-1].end) if computing else start
            computing.append(Span("compute", label, start, max(start, end)))
    idle = [
        (one.end, other.start) for one, other in pairwise(computing)
        if other.start - one.end > _PAUSE
    ]  # fmt: skip
    waits = [
        Span("wait", "wait", max(start, m.start), min(end, m.end))
        for start, end in idle
        for m in messages
        if m.start < end and m.end > start
    ]
    return messages + computing + waits


def _nccl_message(event: Event, axes: Axes) -> Span:
    """A message from its kernel, which says more than gloo's: its group and its elements."""
    facts = event.get("args", {})
    raw = str(facts.get("Collective name", event["name"])).lstrip("_").lower()
    name = next((k for k, begins in KINDS.items() if raw.startswith(begins)), "message")
    size = BYTES.get(str(facts.get("dtype", "")).lower())
    span = Span("collective", name, event["ts"], _end(event))
    if size is not None and "In msg nelems" in facts:
        span.bytes = int(facts["In msg nelems"]) * size
    try:
        ranks = ast.literal_eval(str(facts.get("Process Group Ranks", "")))
        span.axis = axis_of(axes.layout, ranks)
    except (ValueError, SyntaxError):  # not given, or cut short because there are many
        span.axis = axes.take(name, facts.get("In msg nelems"))
    return span
