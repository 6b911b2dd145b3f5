"""States to save, and the helpers that damage what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)


def make_state(seed: int) -> dict[str, Any]:
    """A state with a tensor of every dtype in use, and values that text would round."""
    noise = torch.Generator().manual_seed(seed)
    model = {
        f"blocks.0.{str(dtype).removeprefix('torch.')}": (
            torch.randn(6, 4, generator=noise) * 10
        ).to(dtype)
        for dtype in DTYPES
    }
    return {
        "model": model,
        "optimizer": {
            "state": {"blocks.0.float32": {"exp_avg": torch.randn(6, 4, generator=noise)}},
            "groups": [{"lr": 0.1 + seed / 3, "betas": (0.9, 0.95), "names": ["a", "b"]}],
        },
        "progress": {"step": seed, "loss": 1 / 3 + seed, "note": "é", "best": None},
    }


def tensors_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of `make_state`'s result."""
    moments = state["optimizer"]["state"]["blocks.0.float32"]
    return {**state["model"], **{f"moment.{name}": value for name, value in moments.items()}}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bitwise equality of two states."""
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert a["optimizer"]["groups"] == b["optimizer"]["groups"]
    assert a["progress"] == b["progress"]


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file, leaving its size alone."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
