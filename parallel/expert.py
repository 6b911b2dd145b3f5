"""Tokens to the ranks of their experts and back: all-to-all over the expert axis.

Forward, rows go out and results come back; backward, gradients go the same ways in turn. So the
gradient of an expert's weights holds what the rows of every rank of the axis contribute, and is
not summed over the axis again. Under tensor parallelism every rank of the tensor axis exchanges
the same rows along its own group of the expert axis.

Two messages stay in flight (`lazy`): the rows, until `arrive`; and in the backward pass the
gradients of the results, until what was computed between departure and arrival, such as shared
experts, has had its own backward pass.

Axes: P rows, D width, E experts of all ranks, R ranks, L experts of one rank, C slots of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function

from model.dispatch import Dispatch, Journey
from parallel.collectives import Group, apply, settled


def all_to_all(
    x: Tensor, received: list[int], sent: list[int], group: Group, lazy: bool = False
) -> Tensor:
    """The first sent[0] rows go to rank 0 of the group, and so on; received[0] rows come first."""
    arrived: Tensor = functional.all_to_all_single(x.contiguous(), received, sent, group)
    return arrived if lazy else settled(arrived)


class ExpertDispatch(Dispatch):
    """The ranks of `group` hold equally many experts each, in their order."""

    def __init__(self, group: Group, lazy: bool = True):
        self.group, self.size, self.lazy = group, group.size(), lazy

    def rows(self, x_PD: Tensor, count_E: Tensor) -> Journey:
        each = [len(count_E) // self.size] * self.size
        count_RL = all_to_all(count_E, each, each, self.group).view(self.size, -1)
        sums_2R = torch.stack((count_E.view(self.size, -1).sum(1), count_RL.sum(1)))
        numbers = self.read(sums_2R.flatten())
        sent, received = numbers[: self.size], numbers[self.size :]
        return _Exchanged(self, x_PD, count_RL, sent, received)

    def slots(self, x_ECD: Tensor) -> Journey:
        experts, slots, width = x_ECD.shape
        here = experts // self.size
        count_RL = torch.full((self.size, here), slots, device=x_ECD.device)
        each = [here * slots] * self.size
        return _Slots(self, x_ECD.reshape(-1, width), count_RL, each, each)


class _Exchanged(Journey):
    """Rows that have left: they come grouped by the rank that sent them, then by expert."""

    def __init__(
        self, by: ExpertDispatch, x_PD: Tensor, count_RL: Tensor, sent: list[int], got: list[int]
    ):
        self.by, self.sent, self.got = by, sent, got
        self.count_E = count_RL.sum(0)
        self.order: Tensor | None = None  # of arrival → grouped by expert
        self.place: Tensor | None = None  # and back
        if count_RL.shape[1] > 1:
            expert_RL = torch.arange(count_RL.shape[1], device=x_PD.device).expand_as(count_RL)
            expert_P = expert_RL.flatten().repeat_interleave(
                count_RL.flatten(), output_size=sum(got)
            )
            self.order = expert_P.argsort(stable=True)
            self.place = torch.empty_like(self.order).scatter(
                0, self.order, torch.arange(len(self.order), device=x_PD.device)
            )
        # Its backward is waited for at once: nothing else is left to compute there.
        self.x = apply(AllToAll, x_PD, got, sent, by.group, by.lazy, False)
        node: Any = self.x.grad_fn
        self._departed = None if node is None else node._sequence_nr()

    def arrive(self) -> tuple[Tensor, Tensor]:
        return apply(Regroup, self.x, self.order, self.place), self.count_E

    def back(self, y: Tensor) -> Tensor:
        y = apply(Regroup, y, self.place, self.order)
        node: Any = y.grad_fn
        if self.by.lazy and node is not None and self._departed is not None:
            # Of the nodes that can run, autograd takes the one made last. This one waits for the
            # gradients; as old as the departure it lets all that was made since go first.
            node._set_sequence_nr(self._departed)
        return apply(AllToAll, y, self.sent, self.got, self.by.group, False, self.by.lazy)


class _Slots(_Exchanged):
    """The same with equally many rows for every expert, as ECD."""

    def arrive(self) -> tuple[Tensor, Tensor]:
        x_PD, count_L = super().arrive()
        here = len(count_L)
        return x_PD.unflatten(0, (here, len(x_PD) // here)), count_L

    def back(self, y: Tensor) -> Tensor:
        y_PD = super().back(y.flatten(0, 1))
        experts = len(self.count_E) * self.by.size
        y_ECD: Tensor = y_PD.unflatten(0, (experts, len(y_PD) // experts))
        return y_ECD


class AllToAll(Function):
    """Rows to the ranks of the axis; backward takes the gradients the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        received: list[int],
        sent: list[int],
        group: Group,
        lazy: bool,
        lazy_backward: bool,
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.group, ctx.lazy = received, sent, group, lazy_backward
        return all_to_all(x, received, sent, group, lazy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = all_to_all(grad, ctx.sent, ctx.received, ctx.group, ctx.lazy)
        return back, None, None, None, None, None


class Regroup(Function):
    """Rows in another order, waited for where they travel; so are the gradients. None: as is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor | None, place: Tensor | None) -> Tensor:
        ctx.place = place
        arrived = settled(x)
        return arrived.view_as(arrived) if order is None else arrived.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = settled(grad)
        return (grad if ctx.place is None else grad.index_select(0, ctx.place)), None, None
