"""Muon: momentum, orthogonalised. N matrices of one shape are worked on as one batch NRC.

Axes: N matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from core.errors import UserError
from core.registry import register
from training.optimizers.adamw import LocalAdamW
from training.optimizers.base import Optimizer
from training.optimizers.shards import Shard

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients chosen for the steepest slope at 0: singular values end in about 0.7 to 1.2."""


def orthogonalise(x_NRC: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest semi-orthogonal matrices: U Vᵀ of x = U S Vᵀ, with S brought near 1.

    Newton-Schulz iteration of a quintic (Jordan et al. 2024); float32 on the CPU, bfloat16 on a
    GPU, where it is as good and much faster.
    """
    a, b, c = QUINTIC
    x = x_NRC.bfloat16() if x_NRC.is_cuda else x_NRC.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # the Gram matrix is then the small one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_NRC.dtype)


@register(
    "optimizer",
    "muon",
    paper="2502.16982",
    title="Muon is Scalable for LLM Training",
)
class Muon(Optimizer):
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024), AdamW for the rest.

    The same update whatever the sharding: momentum is kept in shards, and the matrix that is
    orthogonalised is the whole one.

    Args:
        lr: the peak learning rate of the hidden matrices.
        momentum: decay of the running mean of the gradient.
        nesterov: look ahead along the momentum.
        newton_schulz_steps: iterations of the orthogonalisation.
        scale: what an update is multiplied by. aspect: √max(1, rows/columns), as Jordan et al.;
            rms: 0.2·√max(rows, columns), which gives it AdamW's usual size so that one learning
            rate suits both (Liu et al. 2025, 2502.16982).
        weight_decay: taken off the weights that decay, as a fraction of the learning rate.
        adam_lr: the peak learning rate of everything else.
        betas: AdamW's decays.
        eps: AdamW's epsilon.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: Annotated[float, Field(gt=0)] = 0.02,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: Annotated[int, Field(gt=0)] = 5,
        scale: Literal["aspect", "rms"] = "aspect",
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        adam_lr: Annotated[float, Field(gt=0)] = 3e-3,
        betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
            0.9,
            0.95,
        ),
        eps: Annotated[float, Field(gt=0)] = 1e-8,
    ):
        super().__init__(model, lr)
        self.momentum, self.nesterov, self.scale = momentum, nesterov, scale
        self.newton_schulz_steps, self.weight_decay = newton_schulz_steps, weight_decay
        self.matrices = [s for s in self.shards if s.role.matrix]
        if not self.matrices and getattr(model, "here", True):  # a pipeline's stage may have none
            raise UserError(
                "train.optimizer: muon is for hidden matrices and the model has none; use adamw"
            )
        rest = [s for s in self.shards if not s.role.matrix]
        self.adam = LocalAdamW(rest, adam_lr, betas, eps, weight_decay) if rest else None
        self.buffers = {s.name: torch.zeros_like(s.local) for s in self.matrices}
        self.batches: dict[tuple[int, ...], list[Shard]] = {}
        for shard in self.matrices:
            shape = (*shard.parameter.shape[-2:], shard.role.fan_out > shard.role.fan_in)
            self.batches.setdefault(shape, []).append(shard)

    def update(self, factor: float) -> None:
        if self.adam is not None:
            self.adam.update(factor)
        with torch.no_grad():
            for members in self.batches.values():
                self._update([s for s in members if s.local.grad is not None], factor)

    def _update(self, members: list[Shard], factor: float) -> None:
        """One update of matrices of one shape: local momentum, whole matrices, local update."""
        if not members:
            return
        gradients = [s.gradient for s in members]
        buffers = [self.buffers[s.name] for s in members]
        torch._foreach_lerp_(buffers, gradients, 1.0 - self.momentum)
        ahead = torch._foreach_lerp(gradients, buffers, self.momentum) if self.nesterov else buffers
        wholes = [s.whole(x) for s, x in zip(members, ahead, strict=True)]
        flat = [whole.reshape(-1, *whole.shape[-2:]) for whole in wholes]
        updates = orthogonalise(torch.cat(flat), self.newton_schulz_steps)
        updates = updates.split([len(matrices) for matrices in flat])
        lr = self.lr * factor
        for shard, update, whole in zip(members, updates, wholes, strict=True):
            if shard.role.decay and self.weight_decay:
                shard.local.mul_(1.0 - lr * self.weight_decay)
            part = shard.part(update.reshape(whole.shape))
            shard.local.add_(part, alpha=-lr * self._scale(shard))

    def _scale(self, shard: Shard) -> float:
        rows, columns = shard.role.fan_out, shard.role.fan_in
        if self.scale == "aspect":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        held = {name: {"momentum": buffer} for name, buffer in self.buffers.items()}
        return held | (self.adam.tensors() if self.adam is not None else {})
