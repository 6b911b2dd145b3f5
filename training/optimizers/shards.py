"""A rank's own part of a parameter, and the way to the whole tensor and back.

Elementwise updates need no communication and no DTensor arithmetic: they run on plain local
tensors that share memory with the parameters. State goes back under a DTensor's layout for
checkpoints, and what needs a whole matrix gathers it here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from model.leaves import Role, roles

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation recomputation put into a parameter's name."""


def logical(name: str) -> str:
    """A parameter's name without the wrappers around its module."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@dataclass(eq=False)
class Shard:
    """One trainable parameter: its logical name, its role and this rank's part of it."""

    name: str
    parameter: nn.Parameter
    role: Role
    local: Tensor

    def take_gradient(self) -> None:
        """Hand the parameter's gradient to the local tensor."""
        gradient = self.parameter.grad
        if isinstance(gradient, DTensor):
            assert isinstance(self.parameter, DTensor)
            if gradient.placements != self.parameter.placements:
                gradient = gradient.redistribute(placements=self.parameter.placements)
            gradient = local_part(gradient)
        self.local.grad = gradient

    @property
    def gradient(self) -> Tensor:
        """This rank's part of the gradient, once taken."""
        assert self.local.grad is not None
        return self.local.grad

    def whole(self, local: Tensor) -> Tensor:
        """The full tensor of which `local` is this rank's part; a collective if it is sharded."""
        like = self.wrap(local)
        return like.full_tensor() if isinstance(like, DTensor) else like

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a full tensor that every rank holds; no communication."""
        if not isinstance(self.parameter, DTensor):
            return whole
        mesh = self.parameter.device_mesh
        alike = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return local_part(alike.redistribute(placements=self.parameter.placements))

    def wrap(self, local: Tensor) -> Tensor:
        """A tensor laid out like this rank's part, under the parameter's global layout."""
        if not isinstance(self.parameter, DTensor):
            return local
        return DTensor.from_local(
            local,
            self.parameter.device_mesh,
            self.parameter.placements,
            run_check=False,
            shape=self.parameter.shape,
            stride=self.parameter.stride(),
        )


def local_part(tensor: Tensor) -> Tensor:
    """This rank's plain tensor, sharing memory; a plain tensor is its own part."""
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach()


def shards(model: nn.Module) -> list[Shard]:
    """Every trainable parameter of a model, in order.

    Raises:
        TypeError: if a parameter has no role.
    """
    known = roles(model)
    return [
        Shard(logical(name), parameter, known[name], local_part(parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
