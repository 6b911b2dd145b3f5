"""Which part of every parameter this rank keeps under ZeRO, and where DeepSpeed has it.

ZeRO 1 and 2 lay the parameters of a group end to end and give each rank an equal stretch; ZeRO 3
does so with each parameter. A part is therefore a stretch of one parameter, and its weights,
moments and gradient are views of DeepSpeed's flat tensors: what is written there, DeepSpeed has.

This file reads fields of DeepSpeed that are no interface; `pyproject.toml` names the versions that
have them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Part:
    """A stretch of a parameter: elements `start`… of this rank's box of it, row by row.

    weight: one axis; fp32, the values that steps change.
    state: AdamW's, by its names, shaped as `weight` but for `step`, which a whole flat tensor
        shares; empty for what is not trained.
    gradient: after a backward pass, shaped as `weight`; None if there is none.
    """

    start: int
    weight: Tensor
    state: dict[str, Tensor]
    gradient: Callable[[], Tensor | None]


def add_state(inner: torch.optim.AdamW, flat: Tensor) -> None:
    """AdamW's state from the start, so that checkpoints can be loaded into it."""
    inner.state[flat] = {
        "step": torch.zeros((), device=flat.device),
        **{name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS},
    }


def parts(engine: Any, stage: int, named: list[tuple[str, nn.Parameter]]) -> dict[str, Part]:
    """This rank's part of every parameter; empty stretches where it has none."""
    for flat in _flats(engine, stage):
        add_state(engine.basic_optimizer, flat)
    if stage == 0:
        return {name: _whole(engine, parameter) for name, parameter in named}
    groups = engine.optimizer.fp16_groups if stage == 3 else engine.optimizer.bit16_groups
    places = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group)}
    find = _of_parameter if stage == 3 else _of_group
    return {
        name: find(engine, parameter, *places.get(id(parameter), (-1, -1)))
        for name, parameter in named
    }


def _flats(engine: Any, stage: int) -> list[Tensor]:
    """The tensors that AdamW works on."""
    if stage == 0:
        return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _state(engine: Any, flat: Tensor, start: int, count: int) -> dict[str, Tensor]:
    held = engine.basic_optimizer.state[flat]
    return {"step": held["step"]} | {
        name: held[name].view(-1).narrow(0, start, count) for name in MOMENTS
    }


def _whole(engine: Any, parameter: nn.Parameter) -> Part:
    """Stage 0, and what no step changes: every rank has all of it."""

    def gradient() -> Tensor | None:
        return None if parameter.grad is None else parameter.grad.view(-1)

    weight = parameter.data.view(-1)
    trained = parameter.requires_grad
    state = _state(engine, parameter, 0, weight.numel()) if trained else {}
    return Part(0, weight, state, gradient)


def _of_group(engine: Any, parameter: Any, group: int, index: int) -> Part:
    """Stages 1 and 2: where the parameter and this rank's stretch of its group overlap."""
    if not parameter.requires_grad:
        return _whole(engine, parameter)
    mapping = parameter._hp_mapping
    flat = engine.optimizer.single_partition_of_fp32_groups[group]
    if mapping is None:
        return Part(0, flat.data[:0], _state(engine, flat, 0, 0), lambda: None)
    here = mapping.hp_fragment_address

    def gradient() -> Tensor | None:
        held: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return held.view(-1)

    return Part(
        mapping.lp_fragment_address.start,
        flat.data.narrow(0, here.start, here.numel),
        _state(engine, flat, here.start, here.numel),
        gradient,
    )


def _of_parameter(engine: Any, parameter: Any, group: int, index: int) -> Part:
    """Stage 3: the rank's equal share of the parameter, the last ones cut short."""
    zero = engine.optimizer
    share = parameter.partition_numel()
    start = share * parameter.ds_zero_partition_rank
    count = max(0, min(share, parameter.ds_numel - start))
    start = min(start, parameter.ds_numel)
    if not parameter.requires_grad:
        return Part(start, parameter.ds_tensor.data.narrow(0, 0, count), {}, lambda: None)
    _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]

    def gradient() -> Tensor | None:
        if zero.offload_optimizer:
            grad: Tensor = flat.grad
            return grad.narrow(0, offset, count)
        held: Tensor = zero.averaged_gradients[group][index]
        return held.view(-1).narrow(0, 0, count)

    return Part(
        start,
        flat.data.narrow(0, offset, count),
        _state(engine, flat, offset, count),
        gradient,
    )


@torch.no_grad()
def publish(engine: Any, stage: int) -> None:
    """Let the model compute with the parts' weights, after they were changed; a collective."""
    zero = engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for held, weights in zip(
            zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
        ):
            held.data.copy_(weights.data)  # the same memory but for offloaded state
        zero.parameter_offload.partition_all_parameters()  # what is gathered is old


def forget(engine: Any, stage: int) -> None:
    """Drop gradients that no step has used."""
    zero = engine.optimizer
    if stage == 0:
        engine.zero_grad()
        return
    zero.zero_grad(set_to_none=True)
    zero.micro_step_id = 0 if stage == 3 else -1
    zero._epilogue_ran_this_backward = False
    if stage < 3:
        for index in range(len(zero.bit16_groups)):
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
