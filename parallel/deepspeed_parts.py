"""Which part of every parameter this rank keeps under ZeRO, and where DeepSpeed has it.

ZeRO 1 and 2 lay the parameters of a group end to end and give each rank an equal stretch; ZeRO 3
does so with each parameter. A part is therefore a stretch of one parameter, and its weights,
moments and gradient are views of DeepSpeed's flat tensors: what is written there, DeepSpeed has.

This file reads fields of DeepSpeed that are no interface; `pyproject.toml` names the versions that
have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.deepspeed_disk import MOMENTS, OnDisk, add_state


@dataclass
class Part:
    """A stretch of a parameter: elements `start`… of this rank's box of it, row by row.

    count: how many elements it has.
    weight: one axis; fp32, the values that steps change.
    state: AdamW's, by its names, shaped as `weight` but for `step`, which a whole flat tensor
        shares; empty for what is not trained.
    gradient: after a backward pass, shaped as `weight`; None if there is none.
    disk: where all this is if it is not in memory; `weight` and the moments are then empty.
    """

    start: int
    count: int
    weight: Tensor
    state: dict[str, Tensor]
    gradient: Callable[[], Tensor | None]
    disk: OnDisk | None = None


def parts(engine: Any, stage: int, named: list[tuple[str, nn.Parameter]]) -> dict[str, Part]:
    """This rank's part of every parameter; empty stretches where it has none."""
    for flat in _flats(engine, stage):
        add_state(engine.basic_optimizer, flat)
    if stage == 3:
        return _of_parameters(engine, named)
    if stage == 0:
        return {name: _whole(engine, parameter) for name, parameter in named}
    places = {id(p): g for g, group in enumerate(engine.optimizer.bit16_groups) for p in group}
    return {name: _of_group(engine, parameter, places) for name, parameter in named}


def _flats(engine: Any, stage: int) -> list[Tensor]:
    """The tensors that AdamW works on."""
    if stage == 0:
        return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    if stage == 3:
        zero = engine.optimizer
        flats = enumerate(zero.fp32_partitioned_groups_flat)
        return [flat for group, flat in flats if not zero._swappable_optimizer_subgroup(group)]
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
    return Part(0, weight.numel(), weight, state, gradient)


def _of_group(engine: Any, parameter: Any, groups: dict[int, int]) -> Part:
    """Stages 1 and 2: where the parameter and this rank's stretch of its group overlap."""
    if not parameter.requires_grad:
        return _whole(engine, parameter)
    mapping = parameter._hp_mapping
    flat = engine.optimizer.single_partition_of_fp32_groups[groups[id(parameter)]]
    if mapping is None:
        return Part(0, 0, flat.data[:0], _state(engine, flat, 0, 0), lambda: None)
    here = mapping.hp_fragment_address

    def gradient() -> Tensor | None:
        held: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return held.view(-1)

    return Part(
        mapping.lp_fragment_address.start,
        here.numel,
        flat.data.narrow(0, here.start, here.numel),
        _state(engine, flat, here.start, here.numel),
        gradient,
    )


def _of_parameters(engine: Any, named: list[tuple[str, nn.Parameter]]) -> dict[str, Part]:
    """Stage 3: the rank's equal share of each parameter, the last ones cut short."""
    zero = engine.optimizer
    places = {
        id(p): (g, i) for g, group in enumerate(zero.fp16_groups) for i, p in enumerate(group)
    }
    disks = {
        group: OnDisk(engine, group)
        for group in range(len(zero.fp16_groups))
        if zero._swappable_optimizer_subgroup(group)
    }
    found: dict[str, Part] = {}
    for name, parameter in named:
        held: Any = parameter
        share = held.partition_numel()
        start = min(share * held.ds_zero_partition_rank, held.ds_numel)
        count = min(share, held.ds_numel - start)
        if not held.requires_grad:
            weight = held.ds_tensor.data.narrow(0, 0, count)
            found[name] = Part(start, count, weight, {}, lambda: None)
            continue
        group, index = places[id(held)]
        _, offset, _ = zero.grad_position[zero.get_param_id(held)]
        flat = zero.fp32_partitioned_groups_flat[group]
        if group in disks:
            disks[group].held[name] = (held, offset, count)
            state = {"step": engine.basic_optimizer.state[flat]["step"]}
            found[name] = Part(start, count, flat.data[:0], state, lambda: None, disks[group])
            continue
        weight, state = flat.data.narrow(0, offset, count), _state(engine, flat, offset, count)
        gradient = functools.partial(_share_of_gradient, zero, group, index, offset, count)
        found[name] = Part(start, count, weight, state, gradient)
    return found


def _share_of_gradient(zero: Any, group: int, index: int, offset: int, count: int) -> Tensor:
    if zero.offload_optimizer:
        flat: Tensor = zero.fp32_partitioned_groups_flat[group].grad
        return flat.narrow(0, offset, count)
    held: Tensor = zero.averaged_gradients[group][index]
    return held.view(-1).narrow(0, 0, count)


@torch.no_grad()
def publish(engine: Any, stage: int) -> None:
    """Let the model compute with the parts' weights, after they were changed; a collective."""
    zero = engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for group, weights in enumerate(zero.fp32_partitioned_groups_flat):
            if not zero._swappable_optimizer_subgroup(group):  # else what writes does this
                # The same memory but for offloaded state.
                zero.fp16_partitioned_groups_flat[group].data.copy_(weights.data)
        zero.parameter_offload.partition_all_parameters()  # what is gathered is old


def scale_by(engine: Any, factor: float) -> None:
    """Let the next step multiply all gradients by a factor."""
    if engine.optimizer.loss_scale != 1.0 / factor:
        engine.optimizer.override_loss_scale(1.0 / factor)


def forget(engine: Any, stage: int) -> None:
    """Drop gradients that no step has used."""
    zero = engine.optimizer
    if stage == 0:
        engine.zero_grad()
        return
    zero.zero_grad(set_to_none=True)
    zero.micro_step_id = 0 if stage == 3 else -1
    scale_by(engine, 1.0)
    zero._epilogue_ran_this_backward = False
    if stage < 3:
        for index in range(len(zero.bit16_groups)):
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
