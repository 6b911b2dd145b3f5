"""AdamW inside DeepSpeed, as the training loop knows optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.registry import PartConfig
from parallel.deepspeed_disk import MOMENTS
from parallel.deepspeed_parts import Part, scale_by


def adamw(spec: PartConfig) -> dict[str, Any]:
    """The options of the one optimizer that DeepSpeed divides here.

    Raises:
        UserError: for another.
    """
    if spec.name != "adamw":
        raise UserError(
            f"train.optimizer: {spec.name} is not for the deepspeed engine, which cuts parameters "
            "into stretches that only know AdamW's elementwise update; use "
            "train.optimizer.name=adamw, or parallel.engine=native"
        )
    return {key: getattr(spec, key) for key in ("lr", "betas", "eps", "weight_decay")}


class ZeroOptimizer:
    """Steps, and shows state under logical names; DeepSpeed holds it.

    Args:
        engine: DeepSpeed's.
        lr: the peak learning rate.
        parts: this rank's part of every parameter.
        shown: a tensor shaped as a part, under the whole parameter's layout.
    """

    def __init__(
        self,
        engine: Any,
        lr: float,
        parts: dict[str, Part],
        shown: Callable[[str, Tensor], Tensor],
    ):
        self.engine, self.lr, self.shown = engine, lr, shown
        self.parts = {name: part for name, part in parts.items() if part.state}
        self.disks = {part.disk for part in parts.values() if part.disk is not None}

    def step(self, factor: float) -> None:
        """One update, at `factor` of the peak learning rate; drops the gradients."""
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.engine.step()
        if self.disks:
            scale_by(self.engine, 1.0)
        assert self.engine.was_step_applied(), "the loop has seen that the gradient is finite"

    def zero_grad(self) -> None:
        """Nothing is left to drop after a step."""

    def state(self) -> dict[str, Any]:
        """The state under logical names; moments share memory with DeepSpeed's, if they are there.

        Counts of steps, and moments that are on a disk, are copies.
        """
        moments = {name: part.state for name, part in self.parts.items()}
        for disk in self.disks:
            moments |= disk.read(*MOMENTS)
        return {
            name: {
                "step": part.state["step"].clone(),
                **{key: self.shown(name, moments[name][key]) for key in MOMENTS},
            }
            for name, part in self.parts.items()
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that was filled in place: what in it are copies.

        Raises:
            UserError: if parameters of one group have taken different numbers of steps.
        """
        first: dict[int, str] = {}
        for name, part in self.parts.items():
            held, loaded = part.state["step"], state[name]["step"]
            other = first.setdefault(id(held), name)
            if not torch.equal(loaded, state[other]["step"]):
                raise UserError(
                    f"optimizer state: '{name}' has taken {int(loaded)} steps and '{other}' "
                    f"{int(state[other]['step'])}, and DeepSpeed counts once for all; use "
                    "parallel.engine=native"
                )
            held.copy_(loaded)
        for disk in self.disks:
            disk.write({n: {key: state[n][key].flat() for key in MOMENTS} for n in disk.held})
