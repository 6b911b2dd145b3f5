"""AdamW, its groups taken from the parameters' roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from core.registry import register
from training.optimizers.base import Optimizer
from training.optimizers.shards import Shard


class LocalAdamW:
    """torch's fused AdamW on the local tensors of some shards; decay only where a role says so."""

    def __init__(
        self,
        shards: Sequence[Shard],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        self.lr = lr
        decayed = [s.local for s in shards if s.role.decay]
        plain = [s.local for s in shards if not s.role.decay]
        groups: list[dict[str, Any]] = [
            {"params": tensors, "weight_decay": decay}
            for tensors, decay in ((decayed, weight_decay), (plain, 0.0))
            if tensors
        ]
        self.held = list(shards)
        self.inner = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        for shard in shards:
            self.inner.state[shard.local] = {
                "step": torch.zeros((), device=shard.local.device),
                "exp_avg": torch.zeros_like(shard.local),
                "exp_avg_sq": torch.zeros_like(shard.local),
            }

    def update(self, factor: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = self.lr * factor
        self.inner.step()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {s.name: dict(self.inner.state[s.local]) for s in self.held}


@register(
    "optimizer",
    "adamw",
    paper="1711.05101",
    title="Decoupled Weight Decay Regularization",
)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, 1711.05101), fused; roles say what decays.

    Args:
        lr: the peak learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the mean square.
        weight_decay: taken off the weights that decay, as a fraction of the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: Annotated[float, Field(gt=0)] = 1e-3,
        betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
            0.9,
            0.95,
        ),
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0)] = 0.1,
    ):
        super().__init__(model, lr)
        self.adam = LocalAdamW(self.shards, lr, betas, eps, weight_decay)

    def update(self, factor: float) -> None:
        self.adam.update(factor)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.adam.tensors()
