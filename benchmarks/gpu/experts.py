"""Experts in one kernel a matrix: right against the CPU, and fast beside a dense feed-forward."""

from __future__ import annotations

import statistics

import torch

from benchmarks import moe
from benchmarks.gpu.rows import Row, attempt
from model.experts import Experts
from model.init import initialise

LIMIT = 2e-2


def grouped(device: torch.device) -> Row:
    """The dropless product in bfloat16, uneven and with an expert that gets nothing."""
    tokens, experts, k = 512, 8, 2
    bank = Experts(experts, 128, 256, True, "silu")
    initialise(bank, 0)
    made = torch.Generator().manual_seed(1)
    x_ND = torch.randn(tokens, 128, generator=made)
    chosen_Nk = torch.stack(
        [torch.randperm(experts - 1, generator=made)[:k] for _ in range(tokens)]
    )
    weights_Nk = torch.rand(tokens, k, generator=made)
    wanted = bank.dropless(x_ND, chosen_Nk, weights_Nk)
    bank.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        got = bank.dropless(x_ND.to(device), chosen_Nk.to(device), weights_Nk.to(device))
    off = float((got.cpu().float() - wanted).norm() / wanted.norm())
    return Row("grouped experts, bf16", "ok" if off <= LIMIT else "failed", off, "relative")


def speed(device: torch.device, rounds: int = 20) -> Row:
    """Tokens a second of top 2 of 8 beside dense at equal active FLOPs."""
    case = moe.GPU_CASES["medium"]
    dense, sparse = moe.measure(case, rounds, device)
    ratio = statistics.median(a / b for a, b in zip(dense, sparse, strict=True))
    return Row(
        "top 2 of 8 beside dense", "ok" if ratio >= moe.FLOOR else "failed", ratio, "of dense"
    )


def main() -> list[Row]:
    device = torch.device("cuda", torch.cuda.current_device())
    return [
        attempt("grouped experts, bf16", lambda: grouped(device)),
        attempt("top 2 of 8 beside dense", lambda: speed(device)),
    ]
