"""AdamW's moments and fp32 weights on an NVMe disk, brought to memory one flat tensor at a time.

ZeRO-3 puts a flat tensor on the disk if it is large enough (a megabyte), and each of its gradients
as they come. It has measured them by then, so the global norm needs no reading; and it multiplies
them by a factor as it steps, so neither does clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def add_state(inner: torch.optim.AdamW, flat: Tensor) -> None:
    """AdamW's state from the start, so that checkpoints can be loaded into it."""
    inner.state[flat] = {
        "step": torch.zeros((), device=flat.device),
        **{name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS},
    }


class OnDisk:
    """A flat tensor on the disk, with its moments: sub-group `group` of ZeRO-3's optimizer."""

    def __init__(self, engine: Any, group: int):
        self.engine, self.zero, self.group = engine, engine.optimizer, group
        self.flat: Tensor = self.zero.fp32_partitioned_groups_flat[group]
        self.held: dict[str, tuple[nn.Parameter, int, int]] = {}
        """By name: the parameter, where its part begins in the flat tensor, and how long it is."""
        with self._here(changed=True):
            add_state(engine.basic_optimizer, self.flat)

    @contextmanager
    def _here(self, changed: bool = False) -> Iterator[dict[str, Tensor]]:
        """Inside, flat weights and moments are in memory; then they are written, or let go."""
        self.zero._optimizer_states_and_gradient_swap_in(self.group)
        try:
            yield {"weight": self.flat.data, **self.engine.basic_optimizer.state.get(self.flat, {})}
        finally:
            if changed:
                self.zero._optimizer_states_and_gradient_swap_out(self.group)
            else:
                self.zero._release_swap_buffers(self.group)

    def read(self, *keys: str) -> dict[str, dict[str, Tensor]]:
        """Copies: parameter's name → "weight" or a moment's name → values."""
        with self._here() as flats:
            return {
                name: {key: flats[key].narrow(0, offset, count).clone() for key in keys}
                for name, (_, offset, count) in self.held.items()
            }

    def write(self, values: dict[str, dict[str, Tensor]]) -> None:
        """The way back; the model computes with the new weights."""
        with self._here(changed=True) as flats:
            for name, (_, offset, count) in self.held.items():
                for key, value in values[name].items():
                    flats[key].narrow(0, offset, count).copy_(value)
            self.zero._reassign_or_swap_out_partitioned_parameters(self.group)

    def squares(self, name: str) -> Tensor:
        """The sum of squares of this rank's gradient of a parameter."""
        norms: dict[Any, Tensor] = self.zero.norm_for_param_grads
        norm = norms.get(self.zero.get_param_id(self.held[name][0]), torch.zeros(()))
        return norm.double().square()

    def edit_gradient(self, name: str, change: Callable[[Tensor], None]) -> None:
        """Read this rank's gradient of a parameter, change it in place, and write it."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        parameter = self.held[name][0]
        gradient = safe_get_local_grad(parameter).clone()
        change(gradient)
        safe_set_local_grad(parameter, gradient)
