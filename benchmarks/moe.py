"""What a mixture of experts costs: tokens per second beside a dense model of equal active FLOPs.

    python -m benchmarks.moe [--rounds N] [--threads N]

Both models are alike but for the feed-forward: one of width F, or 8 experts of width F/2 of which
each token uses 2, all on this process, dropless. They take turns, a training step each (forward,
backward, AdamW), in one process, so that whatever else the machine does hits both; a round's ratio
is of two neighbouring turns, and the result is the median over the rounds.

Exit code 1 if a judged case is below 0.75 of dense.
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

from model.init import initialise
from model.zoo import build_model

FLOOR = 0.75


@dataclass(frozen=True)
class Case:
    """A model and the tokens of a step; `width` is of the dense feed-forward."""

    dim: int
    depth: int
    width: int
    vocab: int
    length: int
    batch: int
    judged: bool = True


CASES = {
    "small": Case(192, 4, 512, 2048, 256, 8),
    "wide": Case(512, 2, 1408, 2048, 256, 8),
    "tiny": Case(64, 2, 176, 256, 64, 8, judged=False),
}
GPU_CASES = {"medium": Case(1024, 8, 2816, 32768, 1024, 16)}


def configs(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dense model and the sparse one."""
    model = {
        "kind": "language", "dim": case.dim, "depth": case.depth, "vocab": case.vocab,
        "max_length": case.length,
    }  # fmt: skip
    block = {
        "norm": "rmsnorm",
        "mixer": {"name": "attention", "heads": case.dim // 32},
        "position": "rope",
    }
    dense = {"name": "swiglu", "width": case.width}
    sparse = {"name": "moe", "experts": 8, "top_k": 2, "width": case.width // 2}
    return (
        {**model, "block": {**block, "feedforward": dense}},
        {**model, "block": {**block, "feedforward": sparse}},
    )


def trained(case: Case, config: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """A function that trains the model by a step."""
    model = build_model(config)
    initialise(model, 0)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, case.vocab, (case.batch, case.length + 1), device=device)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(batch)
            loss = output.token_losses.mean()
            for value_B in output.losses.values():
                loss = loss + value_B.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def measure(case: Case, rounds: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each dense and of each sparse step; the first two of each warm up."""
    torch.manual_seed(0)
    steps = [trained(case, config, device) for config in configs(case)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for step, held in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            held.append(time.perf_counter() - start)
    return times[0][2:], times[1][2:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="steps of each model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slow = False
    print("| case | dense, tokens/s | top 2 of 8, tokens/s | ratio | quartiles |")
    print("| --- | --- | --- | --- | --- |")
    for name, case in (GPU_CASES if device.type == "cuda" else CASES).items():
        dense, sparse = measure(case, options.rounds, device)
        ratios = [a / b for a, b in zip(dense, sparse, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        tokens = case.batch * case.length
        speeds = [tokens / statistics.median(held) for held in (dense, sparse)]
        shown = " | ".join(f"{speed:,.0f}" for speed in speeds)
        print(f"| {name} | {shown} | {ratio:.3f} | {low:.3f}–{high:.3f} |", flush=True)
        slow = slow or (case.judged and ratio < FLOOR)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
