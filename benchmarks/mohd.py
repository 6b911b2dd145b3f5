"""What MoHD costs: operations and time beside a dense model, of a branch and of a training step.

    python -m benchmarks.mohd [--rounds N] [--threads N]

Compression: the dense model has the same width. Expansion: it has the narrow width whose cost the
wide one is to keep, and the wide model's operations beyond that are its routers, its fusion and,
in the whole model, its head. Operations are those of matrix products and attention, forward and
backward, counted as they run (launcher/plans/trace.py), so what is masked instead of skipped would
count. Both take turns in one process; a round's ratio is of two neighbouring turns, and the result
is the median over the rounds.

Exit code 1 if a branch's operations are above what its division of the width leaves it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.registry import build
from launcher.plans.trace import Trace
from model.init import initialise
from model.stream import Stream
from model.zoo import build_model

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """`dim` is the dense model's; MoHD's is `expansion` times as wide."""

    dim: int
    delta: float
    expansion: int = 1
    depth: int = 2
    length: int = 256
    batch: int = 2
    vocab: int = 1024

    @property
    def options(self) -> dict[str, Any]:
        return {"name": "mohd", "delta": self.delta, "expansion": self.expansion}


CASES = {
    "compression, delta 0.5": Case(1024, 0.5),
    "compression, delta 0.75": Case(1024, 0.75),
    "expansion 3": Case(512, 1.0, 3),
    "expansion 4": Case(512, 1.0, 4),
}


def parts(case: Case, sparse: bool) -> tuple[Any, Any]:
    """The mixer and the feed-forward, as a config has them."""
    options = case.options if sparse else {}
    mixer = {"name": "attention", "heads": case.dim // 64, **options}
    return mixer, {"name": "swiglu", "ratio": 8 / 3, "multiple_of": 64, **options}


def branch(case: Case, slot: str, sparse: bool) -> Step:
    """Forward and backward through one branch."""
    dim = case.dim * (case.expansion if sparse else 1)
    spec = parts(case, sparse)[slot == "feedforward"]
    module: nn.Module = build(slot, spec, dim=dim, causal=True, position="rope", layer=0)
    x_BTD = torch.randn(case.batch, case.length, dim, requires_grad=True)

    def step() -> None:
        module(x_BTD, Stream(x_BTD)).sum().backward()

    return step


def model(case: Case, sparse: bool) -> Step:
    """A training step of a language model."""
    mixer, feedforward = parts(case, sparse)
    config = {
        "kind": "language", "dim": case.dim * (case.expansion if sparse else 1),
        "depth": case.depth, "vocab": case.vocab, "max_length": case.length,
        "block": {"norm": "rmsnorm", "position": "rope", "mixer": mixer,
                  "feedforward": feedforward},
    }  # fmt: skip
    built = build_model(config)
    initialise(built, 0)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, case.vocab, (case.batch, case.length + 1))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}

    def step() -> None:
        output = built(batch)
        loss = output.token_losses.mean()
        for value_B in output.losses.values():
            loss = loss + value_B.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def operations(step: Step) -> int:
    with Trace({}) as trace:
        step()
    return trace.flops


def ratio(dense: Step, sparse: Step, rounds: int) -> float:
    """Seconds of a sparse step over those of a dense one; the first rounds warm up."""
    found = []
    for _ in range(rounds + 2):
        taken = []
        for step in (dense, sparse):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        found.append(taken[1] / taken[0])
    return statistics.median(found[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="steps of each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    above = False
    print("| case | of | dense GFLOPs | MoHD GFLOPs | FLOPs ratio | time ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        for what in ("mixer", "feedforward", "model"):
            dense, sparse = (
                model(case, kind) if what == "model" else branch(case, what, kind)
                for kind in (False, True)
            )
            counts = [operations(step) for step in (dense, sparse)]
            if what == "feedforward":
                above = above or counts[1] > allowed(case, counts[0])
            flops = " | ".join(f"{count / 1e9:.2f}" for count in counts)
            taken = ratio(dense, sparse, options.rounds)
            print(f"| {name} | {what} | {flops} | {counts[1] / counts[0]:.3f} | {taken:.3f} |",
                  flush=True)  # fmt: skip
    return int(above)


def allowed(case: Case, dense: int) -> float:
    """Operations of a feed-forward: its active part, and the dense router and fusion."""
    wide, total = case.dim * case.expansion, 16 * case.expansion
    extra = wide * (wide // total + 2 * total)
    return case.delta * dense + 3 * 2 * case.batch * case.length * extra


if __name__ == "__main__":
    sys.exit(main())
