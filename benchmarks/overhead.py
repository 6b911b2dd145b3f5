"""What the framework costs: tokens per second beside a hand-written loop of the same model.

    make bench                      # or: python -m benchmarks.overhead [--rounds N]

Both train the same Llama-shaped model from the same weights. They take turns every few steps, in
one process, so that whatever else the machine does hits both; a round's ratio is of two
neighbouring turns, and the result is the median over the rounds. Ours is the whole `Trainer` as a
run uses it: data loader, checks for values that are not finite, metrics file, TensorBoard,
progress, signals, deterministic algorithms.

Exit code 1 if ours is below 0.97 of the hand-written. The model of the quickstart is judged, with
and without accumulation; the small one is shown, because a step of some 60 ms makes the fixed cost
of a step visible.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain import Llama, PlainLoop, Shape
from core.config import parse
from data_pipeline.data import Data
from data_pipeline.dataset import Batch, BatchedDataset
from data_pipeline.order import Indices
from model.zoo import build_model
from parallel.layout import Layout
from parallel.native import NativeEngine
from training.callbacks.base import Callback, Record
from training.config import TrainConfig
from training.determinism import use_deterministic
from training.trainer import Trainer

FLOOR = 0.97
CASES = {
    "small": (Shape(128, 4, 4, 4, 352, 65, 64, 12), 20),
    "quickstart": (Shape(192, 6, 6, 2, 512, 2048, 256, 8), 2),
    "accumulated": (Shape(192, 6, 6, 2, 512, 2048, 256, 8, 4), 2),
}
"""Model and step, and steps in a turn."""
SHOWN = {"small"}
"""Cases that are not judged."""
GPU_CASES = {
    "medium": (Shape(1024, 16, 16, 4, 2816, 32768, 1024, 16), 10),
    "small": (Shape(256, 8, 8, 2, 704, 8192, 512, 32), 20),
}


class Rows(BatchedDataset):
    """Sequences of tokens as a dataset."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Indices, draws: Indices) -> Batch:
        rows = self.tokens[torch.from_numpy(indices)]
        return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


class Turns(Callback):
    """After every few steps of ours, lets the hand-written loop take as many; times both."""

    def __init__(self, plain: PlainLoop, steps: int, device: torch.device):
        self.plain, self.steps, self.device = plain, steps, device
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._began = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, trainer: Trainer) -> None:
        self._began = self._now()

    def step(self, trainer: Trainer, record: Record | None) -> None:
        if trainer.step % self.steps:
            return
        middle = self._now()
        self.ours.append(middle - self._began)
        use_deterministic(False)
        start = self._now()
        self.plain.run(self.steps)
        end = self._now()
        self.theirs.append(end - start)
        use_deterministic(self.device.type == "cpu")
        self._began = self._now()


def ours_config(shape: Shape) -> dict[str, Any]:
    """The model of `benchmarks.plain` in the project's words."""
    return {
        "kind": "language",
        "dim": shape.dim,
        "depth": shape.depth,
        "vocab": shape.vocab,
        "max_length": shape.length,
        "block": {
            "norm": "rmsnorm",
            "mixer": {"name": "attention", "heads": shape.heads, "kv_heads": shape.kv_heads},
            "position": "rope",
            "feedforward": {"name": "swiglu", "width": shape.hidden},
        },
    }


def copy_weights(source: nn.Module, target: Llama) -> None:
    """Give the hand-written model the weights of ours, which come in the same order."""
    ours, theirs = dict(source.named_parameters()), dict(target.named_parameters())
    order = sorted(theirs, key=_place)
    assert len(ours) == len(order), (list(ours), order)
    with torch.no_grad():
        for (name, value), key in zip(ours.items(), order, strict=True):
            assert value.shape == theirs[key].shape, (name, key)
            theirs[key].copy_(value)


def _place(name: str) -> tuple[int, int, int]:
    """Where a parameter of the hand-written model stands in ours."""
    inside = ["attention_norm", "q", "k", "v", "out", "forward_norm", "gate", "up", "down"]
    if not name.startswith("blocks."):
        return (0, 0, 0) if name.startswith("embedding") else (2, 0, 0)
    parts = name.split(".")
    return (1, int(parts[1]), next(inside.index(part) for part in parts if part in inside))


def measure(shape: Shape, turn: int, rounds: int, device: torch.device) -> Turns:
    """Both loops by turns; the first two rounds warm up and are not kept."""
    torch.manual_seed(0)
    rounds += 2
    steps = turn * rounds
    tokens = torch.randint(0, shape.vocab, (256, shape.length + 1))
    data = Data("language", Rows(tokens), Rows(tokens[:0]))
    config = parse(
        TrainConfig,
        {
            "steps": steps,
            "global_batch": shape.batch,
            "micro_batch": shape.batch // shape.micro_batches,
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup": 10, "floor": 0.1},
            "precision": "bf16" if device.type == "cuda" else "fp32",
        },
    )
    with torch.device("meta"):
        model = build_model(ours_config(shape))
    llama = Llama(shape).to(device)
    plain = PlainLoop(shape, llama, tokens, steps, lr=1e-3)
    turns = Turns(plain, turn, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config,
            NativeEngine(Layout(), device),
            model,
            data,
            folder=Path(folder),
            callbacks=[turns],
        )
        copy_weights(trainer.engine.model, llama)
        check_same(trainer, llama, tokens[:4].to(device))
        trainer.run()
    turns.ours, turns.theirs = turns.ours[2:], turns.theirs[2:]
    return turns


def check_same(trainer: Trainer, llama: Llama, rows: Tensor) -> None:
    """The comparison is only fair if both compute the same function."""
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    with torch.no_grad():
        ours = trainer.engine.model(batch).token_losses.mean()
        theirs = llama(batch["tokens"], batch["targets"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def main() -> int:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description="Tokens per second beside a hand-written loop.")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each loop per case")
    parser.add_argument("--case", action="append", help="only this case; may be repeated")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU_CASES if device.type == "cuda" else CASES
    print(f"torch {torch.__version__} on {device.type}, {torch.get_num_threads()} threads")
    print(f"{'case':<14}{'ours tok/s':>12}{'plain tok/s':>13}{'ratio':>8}{'quartiles':>16}")
    worst = float("inf")
    for name, (shape, turn) in cases.items():
        if chosen.case and name not in chosen.case:
            continue
        turns = measure(shape, turn, chosen.rounds, device)
        ratios = [b / a for a, b in zip(turns.ours, turns.theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        units = turn * shape.batch * shape.length
        speeds = [units / statistics.median(times) for times in (turns.ours, turns.theirs)]
        spread = f"{low:.3f}–{high:.3f}"
        print(
            f"{name:<14}{speeds[0]:>12,.0f}{speeds[1]:>13,.0f}{middle:>8.3f}{spread:>16}",
            flush=True,
        )
        if name not in SHOWN:
            worst = min(worst, middle)
    good = worst >= FLOOR
    if worst < float("inf"):
        print(f"lowest judged ratio {worst:.3f}: {'at least' if good else 'BELOW'} {FLOOR}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
