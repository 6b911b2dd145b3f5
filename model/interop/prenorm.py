"""A trained pre-LayerNorm language model as pre-RMSNorm, and as pre-CRMSNorm, exactly.

Pre-LayerNorm does not see what is added alike to all channels of the stream. So the mean of all
that is written to the stream can be taken out of the weights that write it; then LayerNorm is
RMSNorm (Jiang et al. 2023, 2305.14858). A stream of zero mean need not store its last channel;
then RMSNorm is CRMSNorm, whose gain and offset go into the matrices that read it.

Axes: V vocabulary, D width, M outputs of a matrix that reads the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.registry import resolve
from model.block import BlockConfig
from model.feedforwards.mlp import hidden_width
from model.language import LanguageModel
from model.zoo import build_model

_WRITERS = ("branch.out", "branch.down")
_READERS = {"mixer": ("q", "k", "v"), "feedforward": ("gate", "up")}
_FEEDFORWARDS = ("mlp", "glu", "swiglu", "geglu", "reglu")


def centred(weight: Tensor, dim: int = 0) -> Tensor:
    """A weight less its mean over the axis of the stream's channels."""
    return weight - weight.mean(dim, keepdim=True)


@torch.no_grad()
def to_rmsnorm(model: LanguageModel) -> LanguageModel:
    """The pre-RMSNorm model with the outputs of a pre-LayerNorm model.

    A tied head keeps the table as it was, so it is tied no longer. The gradient of an old weight
    that writes to the stream is that of the new one, centred.

    Raises:
        UserError: for a model with parts that this does not cover.
    """
    config = model.config
    _check(model, "layernorm")
    blocks = []
    for block in config.block:
        norm: Any = resolve("norm", block.norm)
        blocks.append(block.replace(norm={"name": "rmsnorm", "eps": norm.eps, "bias": norm.bias}))
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"].clone()
    for name in state:
        if name in ("embedding.weight", "position.table.weight"):
            state[name] = centred(state[name], 1)
        elif name.rpartition(".")[0].endswith(_WRITERS):
            state[name] = centred(state[name])
    return _filled(config.replace(block=blocks, tie_embeddings=False), state)


@torch.no_grad()
def to_crmsnorm(model: LanguageModel) -> LanguageModel:
    """The pre-CRMSNorm model, one channel narrower, with the outputs of what `to_rmsnorm` gave.

    Raises:
        UserError: for a model with parts that this does not cover, or whose stream has a mean.
    """
    config = model.config
    _check(model, "rmsnorm")
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    if config.tie_embeddings or state["embedding.weight"].mean(1).abs().max() > 1e-5:
        raise UserError("to_crmsnorm takes a model from to_rmsnorm: the stream needs zero mean")
    blocks = [_narrow(block, config.dim) for block in config.block]
    for index in range(config.depth):
        for slot, readers in _READERS.items():
            place = f"stack.blocks.{index}.sublayers.{slot}."
            if not any(name.startswith(place) for name in state):
                continue
            gain, bias = _take(state, place + "placement.norm", config.dim)
            present = [r for r in readers if f"{place}branch.{r}.weight" in state]
            for reader in present:
                _read(state, f"{place}branch.{reader}", gain, bias)
    gain, bias = _take(state, "stack.norm", config.dim)
    _read(state, "head", gain, bias)
    for name in state:
        if name in ("embedding.weight", "position.table.weight"):
            state[name] = state[name][:, :-1]
        elif name.rpartition(".")[0].endswith(_WRITERS):
            state[name] = state[name][:-1]
    offsets = bool(resolve("norm", config.block[-1].norm).bias)  # type: ignore[attr-defined]
    head_bias = config.head_bias or offsets
    narrow = config.replace(dim=config.dim - 1, block=blocks, head_bias=head_bias)
    return _filled(narrow, state)


def _take(state: dict[str, Tensor], norm: str, dim: int) -> tuple[Tensor, Tensor | None]:
    gain = state.pop(f"{norm}.gain.weight", None)
    if gain is None:
        gain = state["embedding.weight"].new_ones(dim)
    return gain, state.pop(f"{norm}.bias.weight", None)


def _read(state: dict[str, Tensor], name: str, gain: Tensor, bias: Tensor | None) -> None:
    """Fold a norm into the matrix that reads it, and its last column into the others."""
    weight_MD = state[f"{name}.weight"]
    if bias is not None:
        held = state.get(f"{name}.bias")
        offset = weight_MD @ bias
        state[f"{name}.bias"] = offset if held is None else held + offset
    scaled_MD = weight_MD * gain
    state[f"{name}.weight"] = scaled_MD[:, :-1] - scaled_MD[:, -1:]


def _narrow(block: BlockConfig, dim: int) -> BlockConfig:
    """A block of one channel less whose heads and hidden channels stay as they are."""
    norm: Any = resolve("norm", block.norm)
    mixer: Any = resolve("mixer", block.mixer)
    ffn: Any = resolve("feedforward", block.feedforward)
    out_bias = mixer.bias if mixer.out_bias is None else mixer.out_bias
    return block.replace(
        norm={"name": "pre_crmsnorm", "eps": norm.eps, "gain": False},
        mixer=mixer.replace(
            head_dim=mixer.head_dim or dim // mixer.heads,
            bias=mixer.bias or norm.bias,
            out_bias=out_bias,
        ),
        feedforward=ffn.replace(
            width=hidden_width(dim, ffn.ratio, ffn.width, ffn.multiple_of),
            bias=ffn.bias or norm.bias,
        ),
    )


def _check(model: LanguageModel, norm: str) -> None:
    config = model.config
    if config.architecture == "encoder_decoder":
        raise UserError("conversion of norms: encoder-decoders are not covered")
    for block in config.block:
        found = {
            "norm": (block.norm, (norm,)),
            "placement": (block.placement, ("pre",)),
            "residual": (block.residual, ("standard", "ladder")),
            "mixer": (block.mixer, ("attention",)),
            "feedforward": (block.feedforward, _FEEDFORWARDS),
        }
        for slot, (spec, allowed) in found.items():
            part = resolve(slot, spec)
            if part.name not in allowed:
                raise UserError(
                    f"conversion of norms: {slot} '{part.name}' is not covered; it takes "
                    f"{', '.join(allowed)}"
                )
        if block.layer_scale is not None or block.cross is not None:
            raise UserError("conversion of norms: layer_scale and cross are not covered")
    if model.position is not None and not list(model.position.parameters()):
        raise UserError("conversion of norms: positions at the input must be learned")


def _filled(config: Any, state: dict[str, Tensor]) -> LanguageModel:
    """The model of a config with these parameters; those the old one lacked are biases of zero."""
    model = build_model(config)
    assert isinstance(model, LanguageModel)
    model.to(state["embedding.weight"].dtype)
    held = dict(model.named_parameters())
    assert set(state) <= set(held), sorted(set(state) - set(held))
    for name, parameter in held.items():
        assert name in state or name.endswith(".bias"), name
        parameter.copy_(state[name]) if name in state else parameter.zero_()
    return model
