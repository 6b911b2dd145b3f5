"""How much of tensor parallelism's communication the ladder residual hides, over a slow cable.

    python -m benchmarks.ladder [--rates 200,500,…] [--rounds N] [--picture FILE]     # as root

Two ranks, each on a core and in a network namespace of its own, sum over a cable whose rate is set
in Mbit/s (`benchmarks.veth`). The same language model is timed with standard residual, with ladder
residual, and without communication: every reduction over the tensor axis replaced by the identity.
They take turns within every round, so that whatever else the machine does hits all alike; gain and
share are medians over the rounds of

    gain = standard / ladder        hidden = (standard − ladder) / (standard − none)

A step's time is that of the slower rank, from a barrier on. Prints a table and draws a picture.
It needs both cores for some five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ladder_picture import draw
from benchmarks.ladder_rank import DEPTH, DIM, HEADS, HIDDEN, MODES, PASSES, TOKENS, VOCAB
from benchmarks.veth import INTERFACE, STOPS, Link, address
from core.errors import UserError

RATES = (200, 500, 1000, 2000, 4000)


@dataclass
class Row:
    """One rate and pass. Milliseconds a step of every round, by mode; bytes a rank sent."""

    kind: str
    rate: int
    times: dict[str, list[float]]
    sent: dict[str, float]

    def median(self, mode: str) -> float:
        return statistics.median(self.times[mode])

    def rounds(self) -> list[tuple[float, float, float]]:
        """(standard, ladder, none) of every round."""
        standard, ladder, none = (self.times[mode] for mode in MODES)
        return list(zip(standard, ladder, none, strict=True))

    @property
    def gain(self) -> float:
        return statistics.median(standard / ladder for standard, ladder, _ in self.rounds())

    @property
    def hidden(self) -> list[float]:
        """First quartile, median and third quartile of the share of communication hidden."""
        shares = [(s - ladder) / (s - none) for s, ladder, none in self.rounds()]
        return statistics.quantiles(shares, n=4, method="inclusive")

    @property
    def ratio(self) -> float:
        """Communication, as standard residual waits for it, beside compute."""
        return statistics.median((s - none) / none for s, _, none in self.rounds())


def rows(rate: int, answers: list[dict[str, Any]]) -> list[Row]:
    """What both ranks measured at one rate."""
    found = []
    for kind in PASSES:
        times, sent = {}, {}
        for mode in MODES:
            ranks = [answer["passes"][kind][mode] for answer in answers]
            times[mode] = [max(ms for ms, _ in pair) for pair in zip(*ranks, strict=True)]
            sent[mode] = statistics.median(amount for _, amount in ranks[0])
        assert sent["none"] < 0.01 * sent["standard"], f"'none' is not silent: {sent}"
        found.append(Row(kind, rate, times, sent))
    return found


def measure(rates: list[int], rounds: int) -> list[Row]:
    """All rates, with the same two ranks; prints a line for each."""
    found: list[Row] = []
    with Link() as link:
        link.limit(max(rates))
        ranks = [
            link.start(
                end,
                [sys.executable, "-m", "benchmarks.ladder_rank"],
                {
                    "RANK": str(end), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                    "MASTER_ADDR": address(0), "MASTER_PORT": "29511",
                    "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1",
                    "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns that addresses have no names
                },
            )
            for end in range(2)
        ]  # fmt: skip
        for rank in ranks:
            _read(rank)
        for rate in rates:
            link.limit(rate)
            for rank in ranks:
                rank.stdin.write(f"{rounds}\n")
                rank.stdin.flush()
            answers = [_read(rank) for rank in ranks]
            found += rows(rate, answers)
            speed = min(answer["bandwidth"] for answer in answers)
            print(f"{rate} Mbit/s: one large sum runs at {speed:.0f}", file=sys.stderr, flush=True)
    return found


def _read(rank: Any) -> Any:
    """A rank's next answer; between other lines, gloo greets."""
    for line in rank.stdout:
        if line.strip().startswith(("{", '"')):
            return json.loads(line)
    raise UserError("a rank ended before it answered; what it said is above")


def table(found: list[Row]) -> str:
    """The rows as Markdown; a cell of times is the median and, in brackets, the quartiles."""
    lines = [
        "| pass | Mbit/s | standard, ms | ladder, ms | no communication, ms | gain "
        "| communication / compute | hidden |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found, key=lambda row: (PASSES.index(row.kind), row.rate)):
        cells = []
        for mode in MODES:
            low, middle, high = statistics.quantiles(row.times[mode], n=4, method="inclusive")
            cells.append(f"{middle:.0f} ({low:.0f}–{high:.0f})")
        low, middle, high = (100 * share for share in row.hidden)
        share = f"{middle:.0f}% ({low:.0f}–{high:.0f})"
        cells += [f"{row.gain:.2f}", f"{row.ratio:.2f}", share]
        lines.append(f"| {row.kind} | {row.rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steady(found: list[Row]) -> float:
    """A training step's compute where it took longest over where it took shortest.

    It does not depend on the rate, so what is above 1 is other work on the machine.
    """
    compute = [row.median("none") for row in found if row.kind == PASSES[0]]
    return max(compute) / min(compute)


def main(arguments: list[str]) -> int:
    """Measure, print, draw; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="Mbit/s, by commas")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each model at each rate")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/ladder.svg"))
    chosen = parser.parse_args(arguments)
    for number in STOPS[1:]:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        found = measure([int(rate) for rate in chosen.rates.split(",")], max(chosen.rounds, 2))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(
        f"width {DIM}, depth {DEPTH}, {HEADS} heads, feed-forward {HIDDEN}, vocabulary {VOCAB}, "
        f"{TOKENS} tokens, fp32; medians of {chosen.rounds} rounds (quartiles)\n"
        f"torch {torch.__version__}, Linux {platform.release()}, {os.cpu_count()} cores\n"
    )
    print(table(found))
    for kind in PASSES:
        row = next(row for row in found if row.kind == kind)
        sent = ", ".join(f"{mode} {row.sent[mode] / 1e6:.1f}" for mode in MODES)
        print(f"MB sent by a rank, {kind}: {sent}")
    busy = steady(found)
    print(f"compute alone differs between rates by a factor of {busy:.2f}")
    if busy > 1.1:
        print("the machine was busy with other work; measure again", file=sys.stderr)
    chosen.picture.parent.mkdir(parents=True, exist_ok=True)
    chosen.picture.write_text(draw(found), encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
