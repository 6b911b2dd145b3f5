"""What the loop asks of an optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from training.optimizers.shards import Shard, shards


class Optimizer:
    """Base of every optimizer: `update` is the subclass's.

    State tensors exist from the start, so that a checkpoint can be loaded into them in place.
    """

    def __init__(self, model: nn.Module, lr: float):
        self.lr = lr
        """The peak learning rate; what a step uses is this times the schedule's factor."""
        self.shards = shards(model)

    def step(self, factor: float) -> None:
        """One update from the parameters' gradients, at `factor` of the peak learning rates."""
        for shard in self.shards:
            shard.take_gradient()
        self.update(factor)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for shard in self.shards:
            shard.parameter.grad = None
            shard.local.grad = None

    def update(self, factor: float) -> None:
        """One update from `shard.local.grad`; a shard without a gradient stays as it is."""
        raise NotImplementedError

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state's own tensors: shard name → state name → local tensor."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The state under logical names, tensors in their global layout, for checkpoints.

        A checkpoint is loaded into it in place.
        """
        by_name = {shard.name: shard for shard in self.shards}
        return {
            name: {key: _laid_out(by_name[name], value) for key, value in held.items()}
            for name, held in self.tensors().items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state()` that was filled in place: its tensors are the optimizer's own."""


def _laid_out(shard: Shard, value: Tensor) -> Tensor:
    return value if value.dim() == 0 and shard.local.dim() != 0 else shard.wrap(value)
