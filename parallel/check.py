"""Whether a model can run under a layout, said in one line before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from core.config import Config
from core.errors import UserError
from core.registry import Entry, PartConfig, entries
from model.roles import Role, roles
from parallel.heads import divides
from parallel.layout import Layout


def check_model(
    layout: Layout, model: nn.Module, *, recompute: str = "none", compile: bool = False
) -> None:
    """Check that every split axis divides evenly and that no part declares it cannot.

    A module may say what its own math must be able to divide: `split_sizes() -> dict[str, int]`,
    for example `{"heads": 8, "kv_heads": 2}`.

    Args:
        model: best built under `torch.device("meta")`; only shapes are read.

    Raises:
        UserError: for the first thing that does not fit.
        TypeError: if a parameter has no role.
    """
    asked = {
        "tp": layout.tp > 1,
        "sp": layout.sequence_parallel,
        "fsdp": layout.shard > 1,
        "pp": layout.pp > 1,
        "ep": layout.ep > 1,
        "cp": layout.cp > 1,
        "recompute": recompute != "none",
        "compile": compile,
    }
    for entry in used_entries(model):
        for contract, reason in entry.cannot.items():
            if asked.get(contract):
                raise UserError(f"{entry.slot} '{entry.name}' cannot do {contract}: {reason}")
    if layout.cp > 1:
        _check_context(layout, model)
    known, tp = roles(model), layout.tp
    _check_experts(layout.ep, {n: p.shape for n, p in model.named_parameters()}, known)
    if tp == 1:
        return
    for path, module in model.named_modules():
        sizes = module.split_sizes() if hasattr(module, "split_sizes") else {}
        for name, size in sizes.items():
            if size % tp:
                raise UserError(
                    f"parallel.tp: {tp} does not divide {name} ({size}) of {path}; "
                    f"{_fits(size, tp)}"
                )
    for name, parameter in model.named_parameters():
        split = known[name].split
        if split is not None and parameter.shape[split] % tp:
            size = parameter.shape[split]
            more = f", or make it {-(-size // tp) * tp}"
            raise UserError(
                f"parallel.tp: {tp} does not divide axis {split} ({size}) of {name}; "
                f"{_fits(size, tp)}{more}"
            )


def _check_context(layout: Layout, model: nn.Module) -> None:
    """Whether tokens can be divided, and attention see them all by the layout's method."""
    cp, method = layout.cp, layout.cp_method
    if not getattr(model, "divides_tokens", False):
        raise UserError(
            f"parallel.cp: {cp} divides the tokens of a text; an image's are few, and their "
            "mixers need the whole grid: use parallel.cp=1, and parallel.tp with "
            "parallel.sequence_parallel=true where memory is short"
        )
    for path, module in model.named_modules():
        if getattr(module, "context", None) != "attention":
            continue
        backend = getattr(module, "backend", "auto")
        if method == "ring" and backend != "auto":
            raise UserError(
                f"parallel.cp_method: ring computes attention block by block, not by backend "
                f"'{backend}', which {path} asks for; leave backend: auto, or use "
                "parallel.cp_method=heads or gather"
            )
        if method == "heads":
            sizes: dict[str, int] = module.split_sizes()
            heads, kv_heads = (sizes[name] // layout.tp for name in ("heads", "kv_heads"))
            if not divides(heads, kv_heads, cp):
                raise UserError(
                    f"parallel.cp: {cp} does not divide the {heads} heads and {kv_heads} "
                    f"key-value heads that a rank holds of {path}, which parallel.cp_method: "
                    "heads needs; use parallel.cp_method=ring or gather"
                )


def _check_experts(ep: int, shapes: dict[str, torch.Size], known: dict[str, Role]) -> None:
    """Whether every bank's experts divide between the ranks of the expert axis."""
    if ep == 1:
        return
    sizes = {
        name.rpartition(".")[0]: shapes[name][role.expert]
        for name, role in known.items()
        if role.expert is not None
    }
    if not sizes:
        raise UserError(f"parallel.ep: {ep}, but the model has no experts; use parallel.ep=1")
    common = math.gcd(*sizes.values())
    best = max(size for size in range(1, ep + 1) if common % size == 0)
    for bank, size in sizes.items():
        if size % ep:
            raise UserError(
                f"parallel.ep: {ep} does not divide the {size} experts of {bank}; "
                f"use parallel.ep={best}, or make them {-(-size // ep) * ep}"
            )


def _fits(size: int, tp: int) -> str:
    best = max(candidate for candidate in range(1, tp) if size % candidate == 0)
    return f"use parallel.tp={best}"


def used_entries(model: nn.Module) -> Iterator[Entry]:
    """The registered parts of a model: its modules, and what its config names."""
    by_target = {entry.target: entry for entry in entries()}
    seen: set[tuple[str, str]] = set()
    modules = (by_target.get(type(module)) for module in model.modules())
    named = (part.entry for part in _parts(getattr(model, "config", None)))
    for entry in (*modules, *named):
        if entry is not None and (entry.slot, entry.name) not in seen:
            seen.add((entry.slot, entry.name))
            yield entry


def _parts(value: Any) -> Iterator[PartConfig]:
    """Every part config inside a config."""
    if isinstance(value, PartConfig):
        yield value
    if isinstance(value, Config):
        for name in type(value).model_fields:
            yield from _parts(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
