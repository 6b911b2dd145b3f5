"""A rank's own part of a parameter, and the way to the whole tensor and back.

Elementwise updates need no communication and no DTensor arithmetic: they run on plain local
tensors that share memory with the parameters. State goes back under a DTensor's layout for
checkpoints, and what needs a whole matrix gathers it here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from model.roles import Role, roles


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
            assert gradient.placements == self.parameter.placements, self.name
            gradient = local_part(gradient)
        if gradient is not None and gradient.stride() != self.local.stride():
            # A pipeline's backward pass in halves may leave a transposed one, and fused updates
            # read both tensors in the order of memory.
            gradient = torch.empty_like(self.local).copy_(gradient)
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
        Shard(name, parameter, known[name], local_part(parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def drop_gathered(model: nn.Module) -> None:
    """Forget whole parameters that FSDP2 has gathered, so that the next forward pass reads shards.

    After a forward pass without a backward pass the outermost parameters stay gathered; a change of
    their shards, as by swapping in an average, would otherwise not be seen.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
