"""A small model with any placement, and its branches as plain math, for slow references.

The model is causal, without positions: 2 heads of width 8, a feed-forward of 32 with relu,
LayerNorm, everything in float64 and moved off its first values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.contracts.probe import stir
from model.init import initialise
from model.zoo import build_model

IDS = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
Norm = Callable[[Tensor], Tensor]


def small(placement, depth=2, moved=True, **changes):
    """The model; changes are of the block, or with the key `model` of the model."""
    block = {
        "norm": "layernorm", "position": "none", "placement": placement,
        "mixer": {"name": "attention", "heads": 2},
        "feedforward": {"name": "mlp", "ratio": 2, "activation": "relu"},
    }  # fmt: skip
    outer = changes.pop("model", {})
    config = {"kind": "language", "dim": 16, "depth": depth, "vocab": 11, "max_length": 8}
    model = build_model({**config, "block": {**block, **changes}, **outer})
    initialise(model, 0)
    if moved:
        stir(model, 0, 4.0)
    return model.double()


def final(model):
    """What the stack makes of the embeddings."""
    return model.stack(model.embed({"tokens": IDS})).hidden


def layers(model, block):
    """The parameters of a block's two sublayers."""
    held = model.stack.blocks[block].sublayers
    return (dict(held[name].named_parameters()) for name in ("mixer", "feedforward"))


def norm(p, name) -> Norm:
    """The LayerNorm of that name."""
    gain, bias = p[f"{name}.gain.weight"], p[f"{name}.bias.weight"]

    def apply(x):
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * gain + bias

    return apply


def none(x):
    return x


def attention(p, x, qkv: tuple[Norm, Norm, Norm] = (none, none, none), inner: Norm = none):
    """W_O · inner(heads); a head's output is multiplied by its scale where there is one."""
    out = []
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        q, k, v = (
            each(x @ p[f"branch.{name}.weight"][rows].T)
            for name, each in zip("qkv", qkv, strict=True)
        )
        scores = q @ k.transpose(1, 2) / 8**0.5
        future = torch.ones(8, 8).triu(1).bool()
        y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        if "branch.head_scale.weight" in p:
            y = y * p["branch.head_scale.weight"].flatten()[head]
        out.append(y)
    return inner(torch.cat(out, -1)) @ p["branch.out.weight"].T


def mlp(p, x, inner: Norm = none):
    """W_2 · inner(relu(W_1 x + b_1)) + b_2."""
    hidden = F.relu(x @ p["branch.up.weight"].T + p["branch.up.bias"])
    return inner(hidden) @ p["branch.down.weight"].T + p["branch.down.bias"]


def reference(model, block, end=True):
    """The embeddings through `block(mixer's parameters, feedforward's, x)` for each layer."""
    x = model.embedding(IDS)
    for index in range(len(model.stack.blocks)):
        x = block(*layers(model, index), x)
    return norm(dict(model.stack.named_parameters()), "norm")(x) if end else x


def scale(model, factor, *names):
    """Multiply the parameters whose names end so, in every block."""
    found = [p for n, p in model.named_parameters() if n.endswith(names)]
    assert len(found) == len(names) * len(model.stack.blocks)
    with torch.no_grad():
        for parameter in found:
            parameter.mul_(factor)
