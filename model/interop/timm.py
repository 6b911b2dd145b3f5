"""Weights of timm's ViT, DeiT, Swin and PoolFormer under this project's names.

Everything here only renames, splits and reshapes, so gradients are converted like weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from core.errors import UserError, hint

_BLOCK = r"stages.\1.stack.blocks.\2.sublayers."
_RULES: list[tuple[str, str]] = [
    # ViT's and DeiT's blocks are those of one stage; Swin calls its stages layers.
    (r"^blocks\.", "stages.0.blocks."),
    (r"^layers\.", "stages."),
    (r"^patch_embed\.proj\.", "stem.project."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^pos_embed$", "position.table.weight"),
    (r"^norm\.", "stages.{last}.stack.norm."),
    (r"^head\.norm\.", "head.norm."),
    (r"^head\.fc\.", "head.linear."),
    (r"^head\.(weight|bias)$", r"head.linear.\1"),
    (r"^head_dist\.", "head.distilled."),
    (r"\.downsample\.reduction\.", ".resample.reduce."),
    (r"\.downsample\.(conv|norm)\.", r".resample.\1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.norm1\.", _BLOCK + "mixer.placement.norm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.norm2\.", _BLOCK + "feedforward.placement.norm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(layer_scale|ls)1\.\w+$", _BLOCK + "mixer.scale.weight"),
    (
        r"^stages\.(\d+)\.blocks\.(\d+)\.(layer_scale|ls)2\.\w+$",
        _BLOCK + "feedforward.scale.weight",
    ),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.", _BLOCK + "feedforward.branch.up."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.", _BLOCK + "feedforward.branch.down."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.proj\.", _BLOCK + "mixer.branch.out."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.(qkv)\.", _BLOCK + r"mixer.branch.\3."),
    (
        r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$",
        _BLOCK + "mixer.branch.position.table.weight",
    ),
    (r"\bnorm\.weight$", "norm.gain.weight"),
    (r"\bnorm\.bias$", "norm.bias.weight"),
]
_DERIVED = ("relative_position_index", "attn_mask")
"""Tables of older checkpoints that the code computes."""


def from_timm(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A timm model's tensors under the names and in the shapes of `model`'s parameters.

    Args:
        state: a state dict, or gradients by parameter name.
        model: the model to fill; only its names and shapes are read, so it may be on meta.

    Raises:
        UserError: if a tensor has no place in the model, does not fit or is missing.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, ours, tensor in _renamed(state, len(getattr(model, "stages", ()))):
        if ours not in shapes:
            raise UserError(f"timm's '{name}' has no place in the model{hint(ours, shapes)}")
        if tensor.numel() != shapes[ours].numel():
            raise UserError(
                f"timm's '{name}' has shape {tuple(tensor.shape)}, the model's '{ours}' "
                f"{tuple(shapes[ours])}; check image_size, classes and the model's name"
            )
        found[ours] = tensor.reshape(shapes[ours])
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise UserError(f"timm's weights lack the model's '{missing[0]}' ({len(missing)} in all)")
    return found


def _renamed(state: Mapping[str, Tensor], stages: int) -> Iterator[tuple[str, str, Tensor]]:
    """(timm's name, ours, tensor in our order of elements)."""
    prefix = [state[name][0] for name in ("cls_token", "dist_token") if name in state]
    if prefix:
        yield "cls_token", "prefix.weight", torch.cat(prefix)
    for name, tensor in state.items():
        if name in ("cls_token", "dist_token") or name.endswith(_DERIVED):
            continue
        ours = name
        for pattern, replacement in _RULES:
            ours = re.sub(pattern, replacement.replace("{last}", str(stages - 1)), ours)
        if ".qkv." in ours:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                yield name, ours.replace(".qkv.", f".{part}."), values
        elif name.endswith("relative_position_bias_table"):
            yield name, ours, tensor.t()  # heads first
        else:
            yield name, ours, tensor
