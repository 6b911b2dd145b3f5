"""Run folders written by hand."""

import json

CONFIG = """\
run: {name: by <hand>}
model: {kind: language, dim: 8, depth: 2, block: [{mixer: {name: attention, heads: 2}}]}
data: {sources: [{name: text}], sequence: 16}
parallel: {tp: 2}
train: {steps: 40, global_batch: 4, optimizer: {name: adamw, lr: 0.001}}
"""


def records(steps=40):
    for step in range(1, steps + 1):
        record = {
            "step": step, "loss": 4 - step / 20, "grad_norm": 1 / step, "learning_rate": 1e-3,
            "tokens": 64 * step, "tokens_per_second": 1e4, "memory_gb": 0.5, "novelty": step % 3,
            "residual/0/rms": 0.5, "residual/1/rms": 0.7 + step / 100,
            "mohd/0/active": [step / 40, 0.25, 0.0], "mohd/1/active": [0.5, 0.5, 1.0],
        }  # fmt: skip
        if step % 10 == 0:
            record |= {"val/loss": 3.9 - step / 20, "val/bits_per_byte": 2.0, "val/mohd/0/x": 1.0}
        yield record


EVENTS = [
    {"time": 1e9, "event": "start", "step": 0, "seed": 0},
    {"time": 1e9 + 1, "event": "save", "step": 10},
    {"time": 1e9 + 2, "event": "save", "step": 20},
    {"time": 1e9 + 3, "event": "failure", "step": 25, "cause": "the loss is <nan>"},
    {"time": 1e9 + 4, "event": "resume", "step": 20},
    {"time": 1e9 + 5, "event": "end", "step": 40, "signal": None},
]
SUMMARY = {
    "counts": {"parameters": 12345, "active_parameters": 2345},
    "versions": {"torch": "2.13.0"},
    "seconds": 3725.0,
    "seed": 7,
}


def spans():
    return [
        {"kind": "compute", "name": "forward 0", "start": 0.0, "end": 0.004},
        {"kind": "wait", "name": "wait", "start": 0.004, "end": 0.006},
        {"kind": "compute", "name": "backward 0", "start": 0.006, "end": 0.010},
        {"kind": "collective", "name": "all_reduce", "start": 0.003, "end": 0.006,
         "axis": "tp", "bytes": 2048},
        {"kind": "collective", "name": "all_reduce", "start": 0.008, "end": 0.009,
         "axis": "tp", "bytes": 1000},
    ]  # fmt: skip


def timeline(rank, world=2):
    return {
        "step": 20, "rank": rank, "world": world, "place": {"tp": rank}, "device": "cpu",
        "memory": 5e8, "spans": spans(),
    }  # fmt: skip


def write(folder, but=()):
    """A run's folder with everything `but` the files named."""
    files = {
        "config.yaml": CONFIG,
        "metrics.jsonl": "".join(json.dumps(r) + "\n" for r in records()),
        "events.jsonl": "".join(json.dumps(e) + "\n" for e in EVENTS),
        "summary.json": json.dumps(SUMMARY),
        "timeline/rank-0.json": json.dumps(timeline(0)),
        "timeline/rank-1.json": json.dumps(timeline(1)),
    }
    for name, text in files.items():
        if name.split("/")[0] not in but:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf8")
    return folder
