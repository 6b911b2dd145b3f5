"""Outputs, every gradient and the global norm of a language model: each layout = one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluation.contracts.parity import LARGE_LAYOUTS, LAYOUTS, compare
from evaluation.contracts.ranks import Ranks

TOLERANCE = 1e-5
GROUPED = {"name": "attention", "heads": 4, "kv_heads": 2}
BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {
        "mixer": {**GROUPED, "qk_norm": "rmsnorm"},
        "feedforward": {"name": "swiglu", "ratio": 2},
    },
    "gpt": {
        "norm": "layernorm",
        "mixer": {"name": "attention", "heads": 4, "bias": True},
        "position": "learned",
        "feedforward": {"name": "mlp", "bias": True},
    },
    "ladder": {
        "residual": "ladder",
        "mixer": GROUPED,
        "feedforward": {"name": "mlp", "ratio": 2, "bias": True},
        "layer_scale": 0.5,
    },
    "post": {"placement": "post", "mixer": GROUPED, "feedforward": {"name": "geglu", "ratio": 2}},
    "experts": {
        "mixer": GROUPED,
        "feedforward": {"name": "moe", "experts": 4, "top_k": 2, "ratio": 1, "shared": 1},
    },
}


def config(block: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "language",
        "dim": 32,
        "depth": 2,
        "vocab": 64,
        "max_length": 16,
        "block": BLOCKS[block],
        "tie_embeddings": block != "gpt",
        **changes,
    }


def batch(samples: int = 4) -> dict[str, torch.Tensor]:
    """Packed documents; the ranks' counts of targets differ."""
    noise = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 64, (samples, 16), generator=noise)
    targets[0, :9] = -100
    targets[-1, 3] = -100
    documents = (torch.arange(16) >= 6).long().expand(samples, -1).contiguous()
    tokens = torch.randint(0, 64, (samples, 16), generator=noise)
    return {"tokens": tokens, "targets": targets, "documents": documents}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_two_ranks(ranks: Ranks, block: str, layout: str) -> None:
    found = compare(ranks, config(block), batch(), {layout: LAYOUTS[layout]})[layout]
    assert found.worst < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_four_ranks(four_ranks: Ranks, block: str, layout: str) -> None:
    found = compare(four_ranks, config(block), batch(), {layout: LARGE_LAYOUTS[layout]})[layout]
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulated(ranks: Ranks, layout: str) -> None:
    layouts = {layout: LAYOUTS[layout]}
    found = compare(ranks, config("llama"), batch(8), layouts, micro_batches=2)[layout]
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize("layout", ["tp2+sp", "fsdp2", "replicate2"])
@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputed(ranks: Ranks, layout: str, recompute: str) -> None:
    found = compare(
        ranks,
        config("ladder"),
        batch(),
        {layout: LAYOUTS[layout]},
        prepare={"recompute": recompute},
    )[layout]
    assert found.worst < TOLERANCE, found
