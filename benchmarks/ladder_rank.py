"""One rank of `benchmarks.ladder`: times the models each time a line on standard input asks for it.

Standard and ladder residual are two models; "none" is the standard one with every reduction over
the tensor axis replaced by the identity. Its numbers mean nothing, its local compute is the same.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import parallel.collectives as collectives
from benchmarks.veth import INTERFACE
from core.config import parse
from model.zoo import build_model
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.start import join

DIM, DEPTH, HEADS, HIDDEN, VOCAB, TOKENS = 512, 16, 8, 1408, 1024, 256
MODES = ("standard", "ladder", "none")
PASSES = ("training step", "forward")


def config(residual: str) -> dict[str, Any]:
    return {
        "kind": "language",
        "dim": DIM,
        "depth": DEPTH,
        "vocab": VOCAB,
        "max_length": TOKENS,
        "block": {
            "residual": residual,
            "mixer": {"name": "attention", "heads": HEADS},
            "feedforward": {"name": "swiglu", "width": HIDDEN},
        },
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    total = model(batch).token_losses.sum()
    return {"loss": total, "count": torch.tensor(float(TOKENS)), "samples": torch.tensor(1.0)}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No reduction over the tensor axis: each rank goes on with what it has."""
    former = collectives.all_reduce
    collectives.all_reduce = lambda x, group, op="sum", lazy=False: x
    try:
        yield
    finally:
        collectives.all_reduce = former


def sent() -> int:
    """Bytes that have left through the cable."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


class Rank:
    """The models, prepared, and the steps to time."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        for residual in ("standard", "ladder"):
            engine = join(parse(ParallelConfig, {"tp": 2, "backend": "gloo"}))
            with torch.device("meta"):
                model = build_model(config(residual))
            engine.prepare(model, seed=0, precision="fp32", recompute="none", compile=False)
            engine.model.train()
            self.engines[residual] = engine
        self.engines["none"] = self.engines["standard"]
        ids = torch.randint(0, VOCAB, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
        self.batch = {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}

    def step(self, mode: str, kind: str) -> tuple[float, int]:
        """Milliseconds and bytes sent of one pass, both ranks starting together."""
        engine = self.engines[mode]
        run: Callable[[], Any] = (
            (lambda: engine.evaluate(self.batch, loss))
            if kind == "forward"
            else (lambda: engine.forward_backward([self.batch], loss))
        )
        with silence() if mode == "none" else contextlib.nullcontext():
            dist.barrier()
            bytes_before, start = sent(), time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start), sent() - bytes_before

    def measure(self, rounds: int) -> dict[str, dict[str, list[tuple[float, int]]]]:
        """Every mode in every round, each time in another order; one more round to warm up."""
        found: dict[str, dict[str, list[tuple[float, int]]]] = {
            kind: {mode: [] for mode in MODES} for kind in PASSES
        }
        for index in range(rounds + 1):
            turn = index % len(MODES)
            for kind in PASSES:
                for mode in MODES[turn:] + MODES[:turn]:
                    found[kind][mode].append(self.step(mode, kind))
        return {kind: {m: v[1:] for m, v in modes.items()} for kind, modes in found.items()}

    def bandwidth(self) -> float:
        """Mbit/s each way of one large sum: what the cable and gloo give with nothing beside it."""
        message = torch.ones(1_000_000)
        dist.all_reduce(message)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(message)
        return message.nbytes * 8e-6 / (time.perf_counter() - start)


def main() -> int:
    """Say "ready", then answer each line, a number of rounds, with what was measured, as JSON."""
    torch.set_num_threads(1)
    rank = Rank()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        answer = {"bandwidth": rank.bandwidth(), "passes": rank.measure(int(line))}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
