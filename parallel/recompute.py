"""Activation recomputation and compilation of blocks, by replacing their `forward`.

Names of parameters stay as they are, and what FSDP does around a block stays around it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model.block import Block
from parallel.ring import streaming

_aten = torch.ops.aten
KEPT: frozenset[Any] = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops._c10d_functional.all_gather_into_tensor.default,
        torch.ops._c10d_functional.all_reduce.default,
        torch.ops._c10d_functional.all_to_all_single.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
    }
)
"""What selective recomputation keeps: products of matrices, attention, messages.

Not the products inside ring attention, which together are the whole score matrix.
"""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in KEPT and not streaming.get()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def blocks(model: nn.Module) -> list[Block]:
    """Every block of a model, in order."""
    return [module for module in model.modules() if isinstance(module, Block)]


def wrap_blocks(model: nn.Module, recompute: str, compile: bool) -> None:
    """Recompute (`block`: everything; `selective`: all but `KEPT`) and compile every block."""
    for block in blocks(model):
        forward: Any = block.forward
        if recompute != "none":
            options: dict[str, Any] = {"use_reentrant": False}
            if recompute == "selective":
                options["context_fn"] = functools.partial(
                    create_selective_checkpoint_contexts, _policy
                )
            forward = _recomputed(forward, options)
        if compile:
            forward = torch.compile(forward)
        block.forward = forward  # type: ignore[method-assign]


def _recomputed(forward: Any, options: dict[str, Any]) -> Any:
    def run(stream: Any) -> Any:
        return (
            checkpoint(forward, stream, **options) if torch.is_grad_enabled() else forward(stream)
        )

    return run
