"""A training step of a billion parameters in bfloat16: time, model FLOPs utilisation, memory.

MFU is by the convention of PaLM (2204.02311, appendix B), of the card's dense bfloat16 rate.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.rows import Row, attempt
from benchmarks.gpu.timing import milliseconds
from evaluation.contracts.parity import Loss
from launcher.plans.gpus import GPUS
from model.accounting import count
from model.zoo import build_model
from parallel.config import ParallelConfig
from parallel.engine import Recompute
from parallel.layout import Layout
from parallel.native import NativeEngine
from training.optimizers.adamw import AdamW

BILLION: dict[str, Any] = {
    "kind": "language", "dim": 2048, "depth": 18, "vocab": 32768, "max_length": 4096,
    "tie_embeddings": False,
    "block": {
        "norm": "rmsnorm", "position": "rope",
        "mixer": {"name": "attention", "heads": 16, "kv_heads": 4},
        "feedforward": {"name": "swiglu", "width": 5632},
    },
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "recomputed": {"recompute": "block"},
}


def rate_of(name: str) -> float | None:
    """The card's dense bfloat16 operations a second, by its name; None where it is not known."""
    return next((gpu.flops for key, gpu in GPUS.items() if key in name.lower()), None)


def measure(
    config: dict[str, Any],
    batch_size: int,
    device: torch.device,
    *,
    recompute: Recompute = "none",
    compile: bool = False,
    rounds: int = 10,
) -> tuple[float, float, float]:
    """Milliseconds of a step, its FLOPs, and the most bytes that were held (0 on a CPU)."""
    with torch.device("meta"):
        model = build_model(config)
    engine = NativeEngine(Layout(), device, ParallelConfig())
    engine.prepare(model, seed=0, precision="bf16", recompute=recompute, compile=compile)
    engine.model.train()
    optimizer = AdamW(engine.model)
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config["vocab"], (batch_size, config["max_length"] + 1), generator=made)
    batch = {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    flops = float(count(engine.model, batch).training_flops or 0)
    loss = Loss()

    def step() -> None:
        engine.forward_backward([batch], loss)
        engine.clip_gradients(1.0)
        optimizer.step(1.0)
        optimizer.zero_grad()
        loss.outputs.clear()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = milliseconds(step, device, rounds)
    held = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0
    return taken, flops, held


def row(name: str, options: dict[str, Any], device: torch.device) -> Row:
    torch.set_float32_matmul_precision("high")
    taken, flops, held = measure(BILLION, 4, device, **options)
    rate = rate_of(torch.cuda.get_device_name(device))
    used = f"MFU {100 * flops / (taken / 1000) / rate:.1f}%, " if rate else ""
    tokens = 4 * BILLION["max_length"] / (taken / 1000)
    note = f"{used}{tokens:,.0f} tokens/s, {held / 2**30:.1f} GiB at most"
    return Row(f"1B step, {name}", "ok", taken, "ms", note)


def main() -> list[Row]:
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for name, options in CASES.items():
        rows.append(attempt(f"1B step, {name}", lambda n=name, o=options: row(n, o, device)))  # type: ignore[misc]
        torch.cuda.empty_cache()
    return rows
