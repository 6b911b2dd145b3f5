"""flash-attn beside PyTorch's fused attention and flex attention: same numbers, and how fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.rows import Row, attempt
from benchmarks.gpu.timing import milliseconds
from core.errors import UserError
from model.attention import Backend, attend
from model.attention.scores import Scores

SHAPES = {"T 1024": (16, 16, 4, 1024, 64), "T 8192": (2, 32, 8, 8192, 128)}
"""Batch, query heads, key heads, tokens, head width; causal."""
LIMIT = 2e-2
BACKENDS: tuple[Backend, ...] = ("sdpa", "flash", "flex")


def problem(
    shape: tuple[int, ...], device: torch.device, documents: bool
) -> tuple[list[Tensor], Scores]:
    """q, k and v in bfloat16, and scores: causal, of one document or several."""
    batch, heads, groups, tokens, width = shape
    made = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, h, tokens, width, generator=made).to(device, torch.bfloat16)
        for h in (heads, groups, groups)
    ]
    ids = (torch.arange(tokens) * 5 // tokens).expand(batch, -1).to(device) if documents else None
    return [t.requires_grad_() for t in tensors], Scores(causal=True, documents=ids)


def compare(shape: tuple[int, ...], device: torch.device, documents: bool) -> list[Row]:
    """A row for each backend: milliseconds forward and backward, and how far it is from sdpa."""
    tensors, scores = problem(shape, device, documents)

    def both(backend: Backend) -> list[Tensor]:
        y = attend(*tensors, scores, backend)
        return [y, *torch.autograd.grad(y.float().square().mean(), tensors)]

    wanted = [t.float() for t in both("sdpa")]

    def row(backend: Backend) -> Callable[[], Row]:
        def run() -> Row:
            name = f"attention {backend}, {'documents, ' if documents else ''}T {shape[3]}"
            try:
                got = both(backend)
            except UserError as error:
                return Row(name, "refused", note=str(error))
            off = max(
                float((a.float() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)
            )
            time = milliseconds(lambda: both(backend), device)
            status = "ok" if off <= LIMIT else "failed"
            return Row(name, status, time, "ms", f"{off:.1e} from sdpa")

        return run

    return [attempt(f"attention {backend}", row(backend)) for backend in BACKENDS]


def main() -> list[Row]:
    device = torch.device("cuda", torch.cuda.current_device())
    return [
        row
        for shape in SHAPES.values()
        for documents in (False, True)
        for row in compare(shape, device, documents)
    ]
