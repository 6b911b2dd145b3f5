"""Whole vision models under every layout of two ranks, against one process."""

import pytest
import torch

from evaluation.contracts.parity import LAYOUTS, compare

BLOCK = {
    "norm": "layernorm",
    "mixer": {"name": "attention", "heads": 2, "bias": True},
    "feedforward": {"name": "mlp", "ratio": 2},
}
BASE = {"kind": "vision", "image_size": 16, "channels": 2, "classes": 4}
STAGES = [{"dim": 16, "depth": 2}, {"dim": 24, "depth": 2}]
MODELS = {
    # 16 patches and two tokens before them divide between two ranks; 17 would not.
    "distilled": {
        **BASE, "dim": 16, "depth": 2, "pool": "distilled", "stem": {"name": "patch", "patch": 4},
        "block": {**BLOCK, "position": "learned", "layer_scale": 0.5},
    },
    "swin": {
        **BASE, "stages": STAGES, "stem": {"name": "patch", "patch": 2, "norm": "layernorm"},
        "block": {
            **BLOCK, "position": "relative_grid",
            "mixer": {"name": "window_attention", "window": 3, "heads": 2},
        },
    },
    "poolformer": {
        **BASE, "stages": STAGES, "stem": {"name": "conv", "kernel": 5, "stride": 2},
        "resample": {"name": "conv", "norm": "groupnorm"}, "pool_norm": "layernorm",
        "block": {
            **BLOCK, "position": "none", "norm": "groupnorm", "mixer": "pooling",
            "layer_scale": 0.5,
        },
    },
    "masked": {
        **BASE, "stages": STAGES, "stem": {"name": "patch", "patch": 2}, "classes": None,
        "reconstruct": "normalised_pixels", "block": {**BLOCK, "position": "none"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_layout_changes_nothing(name, ranks):
    generator = torch.Generator().manual_seed(0)
    batch = {"images": torch.randn(4, 2, 16, 16, generator=generator)}
    if name == "masked":
        batch["mask"] = torch.rand(4, 64, generator=generator) < 0.5
    else:
        batch["targets"] = torch.tensor([3, 0, -100, 1])
    for layout, found in compare(ranks, MODELS[name], batch, LAYOUTS).items():
        assert found.worst < 2e-5, f"{layout}: {found}"
