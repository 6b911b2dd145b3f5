"""Models of Hugging Face's transformers: GPT-2 and Llama shapes.

A family is a config builder and a table of names; what a table picks of a tensor is linear (a
transpose, a slice), so the same table maps weights and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.errors import UserError
from model.language import LanguageModel
from model.zoo import build_model


class Row(NamedTuple):
    """One of our parameters: its name, the name of the tensor it is in, and how it is read."""

    ours: str
    theirs: str
    pick: Callable[[Tensor], Tensor]


def gpt2_config(config: Any) -> dict[str, Any]:
    """Our config of a GPT-2 (Radford et al. 2019), from theirs: an object or config.json's dict.

    Raises:
        UserError: for a variation that has no counterpart here.
    """
    theirs = _read(config, "gpt2")
    _refuse(theirs, "scale_attn_weights", True)
    _refuse(theirs, "scale_attn_by_inverse_layer_idx", False)
    _refuse(theirs, "add_cross_attention", False)
    activations = {
        "gelu_new": {"name": "gelu", "approximate": True},
        "gelu_pytorch_tanh": {"name": "gelu", "approximate": True},
        "gelu": "gelu",
        "relu": "relu",
        "silu": "silu",
    }
    width = theirs.get("n_inner") or 4 * theirs["n_embd"]
    return {
        "kind": "language",
        "dim": theirs["n_embd"],
        "depth": theirs["n_layer"],
        "vocab": theirs["vocab_size"],
        "max_length": theirs["n_positions"],
        "tie_embeddings": theirs.get("tie_word_embeddings", True),
        "embedding_dropout": theirs.get("embd_pdrop", 0.0),
        "init": {"name": "normal", "std": theirs.get("initializer_range", 0.02)},
        "block": {
            "norm": {"name": "layernorm", "eps": theirs.get("layer_norm_epsilon", 1e-5)},
            "placement": "pre",
            "position": "learned",
            "mixer": {
                "name": "attention",
                "heads": theirs["n_head"],
                "bias": True,
                "dropout": theirs.get("attn_pdrop", 0.0),
            },
            "feedforward": {
                "name": "mlp",
                "width": width,
                "activation": _choose(theirs, "activation_function", activations),
            },
            "dropout": theirs.get("resid_pdrop", 0.0),
        },
    }


def llama_config(config: Any) -> dict[str, Any]:
    """Our config of a Llama (Touvron et al. 2023, 2302.13971), from theirs.

    Raises:
        UserError: for a variation that has no counterpart here, such as a scaled RoPE.
    """
    theirs = _read(config, "llama")
    rope = {
        "rope_theta": theirs.get("rope_theta", 10_000.0),
        **(theirs.get("rope_scaling") or {}),
        **(theirs.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"rope_type '{kind}' of the transformers config has no counterpart here")
    gates = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
    bias = theirs.get("attention_bias", False)
    return {
        "kind": "language",
        "dim": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "vocab": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        "init": {"name": "normal", "std": theirs.get("initializer_range", 0.02)},
        "block": {
            "norm": {"name": "rmsnorm", "eps": theirs.get("rms_norm_eps", 1e-6)},
            "placement": "pre",
            "position": {"name": "rope", "base": rope["rope_theta"]},
            "mixer": {
                "name": "attention",
                "heads": theirs["num_attention_heads"],
                "kv_heads": theirs.get("num_key_value_heads"),
                "head_dim": theirs.get("head_dim"),
                "bias": bias,
                "dropout": theirs.get("attention_dropout", 0.0),
            },
            "feedforward": {
                "name": _choose(theirs, "hidden_act", gates),
                "width": theirs["intermediate_size"],
                "bias": theirs.get("mlp_bias", False),
            },
        },
    }


def gpt2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or gradients) from a GPT-2's, whose linears are stored in,out and fused."""
    return _map(_strip(state, "transformer."), _gpt2_rows, "h.", {".attn.bias", ".masked_bias"})


def llama_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters (or gradients) from a Llama's."""
    return _map(_strip(state, "model."), _llama_rows, "layers.", {".inv_freq"})


def from_transformers(model: Any) -> LanguageModel:
    """A copy of a transformers GPT-2 or Llama language model, on the CPU."""
    families: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "gpt2": (gpt2_config, gpt2_state),
        "llama": (llama_config, llama_state),
    }
    make_config, make_state = _choose(
        {"model_type": model.config.model_type}, "model_type", families
    )
    config = make_config(model.config)
    with torch.device("meta"):
        ours = build_model(config)
    assert isinstance(ours, LanguageModel)
    state = make_state(model.state_dict())
    if config["tie_embeddings"]:
        state.pop("head.weight", None)
    ours.to_empty(device="cpu").load_state_dict(state)
    return ours


def _gpt2_rows(depth: int, names: Mapping[str, Tensor]) -> Iterator[Row]:
    yield Row("embedding.weight", "wte.weight", _whole)
    yield Row("position.table.weight", "wpe.weight", _whole)
    yield from _pair("stack.norm", "ln_f")
    for layer in range(depth):
        ours, theirs = f"stack.blocks.{layer}.sublayers", f"h.{layer}"
        yield from _pair(f"{ours}.mixer.placement.norm", f"{theirs}.ln_1")
        yield from _pair(f"{ours}.feedforward.placement.norm", f"{theirs}.ln_2")
        for index, name in enumerate("qkv"):
            fused = f"{theirs}.attn.c_attn"
            yield Row(f"{ours}.mixer.branch.{name}.weight", f"{fused}.weight", _third(index))
            yield Row(f"{ours}.mixer.branch.{name}.bias", f"{fused}.bias", _third(index))
        for leaf, linear in (
            ("mixer.branch.out", "attn.c_proj"),
            ("feedforward.branch.up", "mlp.c_fc"),
            ("feedforward.branch.down", "mlp.c_proj"),
        ):
            yield Row(f"{ours}.{leaf}.weight", f"{theirs}.{linear}.weight", _transposed)
            yield Row(f"{ours}.{leaf}.bias", f"{theirs}.{linear}.bias", _whole)
    if "lm_head.weight" in names:
        yield Row("head.weight", "lm_head.weight", _whole)


def _llama_rows(depth: int, names: Mapping[str, Tensor]) -> Iterator[Row]:
    yield Row("embedding.weight", "embed_tokens.weight", _whole)
    yield Row("stack.norm.gain.weight", "norm.weight", _whole)
    for layer in range(depth):
        ours, theirs = f"stack.blocks.{layer}.sublayers", f"layers.{layer}"
        for branch, norm in (
            ("mixer", "input_layernorm"),
            ("feedforward", "post_attention_layernorm"),
        ):
            gain = f"{ours}.{branch}.placement.norm.gain.weight"
            yield Row(gain, f"{theirs}.{norm}.weight", _whole)
        for leaf, linear in (
            ("mixer.branch.q", "self_attn.q_proj"),
            ("mixer.branch.k", "self_attn.k_proj"),
            ("mixer.branch.v", "self_attn.v_proj"),
            ("mixer.branch.out", "self_attn.o_proj"),
            ("feedforward.branch.gate", "mlp.gate_proj"),
            ("feedforward.branch.up", "mlp.up_proj"),
            ("feedforward.branch.down", "mlp.down_proj"),
        ):
            yield Row(f"{ours}.{leaf}.weight", f"{theirs}.{linear}.weight", _whole)
            if f"{theirs}.{linear}.bias" in names:
                yield Row(f"{ours}.{leaf}.bias", f"{theirs}.{linear}.bias", _whole)
    if "lm_head.weight" in names:
        yield Row("head.weight", "lm_head.weight", _whole)


def _pair(ours: str, theirs: str) -> Iterator[Row]:
    """A LayerNorm's gain and offset."""
    yield Row(f"{ours}.gain.weight", f"{theirs}.weight", _whole)
    yield Row(f"{ours}.bias.weight", f"{theirs}.bias", _whole)


def _whole(value: Tensor) -> Tensor:
    return value.clone()


def _transposed(value: Tensor) -> Tensor:
    return value.t().contiguous()


def _third(index: int) -> Callable[[Tensor], Tensor]:
    """Queries, keys or values out of GPT-2's fused projection, whose last axis is the output."""

    def pick(value: Tensor) -> Tensor:
        part = value.chunk(3, dim=-1)[index]
        return part.t().contiguous() if part.dim() == 2 else part.clone()

    return pick


def _map(
    state: Mapping[str, Tensor],
    rows: Callable[[int, Mapping[str, Tensor]], Iterator[Row]],
    layers: str,
    buffers: set[str],
) -> dict[str, Tensor]:
    """Apply a table; every tensor must be used, and every tensor needed must be there."""
    depth = 1 + max((int(n.split(".")[1]) for n in state if n.startswith(layers)), default=-1)
    mapped: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in rows(depth, state):
        if row.theirs not in state:
            raise UserError(f"the transformers weights lack '{row.theirs}'")
        mapped[row.ours] = row.pick(state[row.theirs])
        used.add(row.theirs)
    left = [n for n in state if n not in used and not any(n.endswith(b) for b in buffers)]
    if left:
        raise UserError(f"the transformers weights hold '{left[0]}', which has no place here")
    return mapped


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names without the prefix that a bare model's checkpoint lacks."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _read(config: Any, kind: str) -> dict[str, Any]:
    values: dict[str, Any] = dict(config) if isinstance(config, dict) else config.to_dict()
    found = values.get("model_type", kind)
    if found != kind:
        raise UserError(f"a transformers config of model_type '{found}' is not a {kind}")
    return values


def _refuse(values: dict[str, Any], key: str, only: Any) -> None:
    if values.get(key, only) != only:
        raise UserError(f"{key}: {values[key]} of the transformers config has no counterpart here")


def _choose(values: dict[str, Any], key: str, known: dict[str, Any]) -> Any:
    if values[key] not in known:
        raise UserError(
            f"{key}: '{values[key]}' of transformers has no counterpart here; known: "
            f"{', '.join(known)}"
        )
    return known[values[key]]
