"""The leaf operations on megatron-core's mappings, groups and vocabulary-parallel loss.

What crosses the border of a sublayer is Megatron's: copy and all-reduce, or, under sequence
parallelism, all-gather and reduce-scatter. What it has no mapping for (sums, maxima and gathers
inside a region) stays `parallel/tensor.py`'s, on Megatron's group.

Megatron all-reduces in place, and a tensor that is not contiguous in a copy that it drops: it is
given contiguous tensors of its own, forward and backward. Its sequence-parallel tensors have tokens
first, ours the batch.

Axes: B batch, T tokens, D width, V vocabulary, N rows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd import Function

from model.roles import Role
from parallel.collectives import Group, apply
from parallel.tensor import TOKENS, DataOperations, TensorOperations


class OwnGradient(Function):
    """The identity; backward hands on a contiguous copy, which what follows may overwrite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


class MegatronAlone(DataOperations):
    """One rank on the tensor axis: Megatron's cross-entropy, and its DDP's parameters."""

    twins: dict[Tensor, Tensor] = {}
    """Parameter → the plain one that Megatron's DDP holds; none without it."""

    def weight(self, parameter: Tensor, role: Role, inside: bool) -> Tensor:
        twin = self.twins.get(parameter)
        return super().weight(parameter, role, inside) if twin is None else twin

    def cross_entropy(self, logits_NV: Tensor, targets_N: Tensor, ignore: int) -> Tensor:
        # float32 logits are normalised in place: a copy is
        own_NV = logits_NV.clone() if logits_NV.dtype == torch.float32 else logits_NV
        loss_N: Tensor = vocab_parallel_cross_entropy(own_NV, targets_N)
        return loss_N.where(targets_N != ignore, 0.0)


class MegatronOperations(MegatronAlone, TensorOperations):
    """Several ranks on the tensor axis; `group` is Megatron's."""

    def __init__(self, group: Group, data: Group | None, sequence_parallel: bool):
        # Megatron's messages are waited for where they are sent.
        super().__init__(group, data, sequence_parallel, lazy=False)

    def tokens_first(self, x_BT: Tensor) -> Tensor:
        """B,T,… → T,B,…, contiguous: Megatron's order.

        Raises:
            UserError: if the tokens cannot be divided between the ranks.
        """
        self._divides(x_BT)
        return x_BT.transpose(0, TOKENS).contiguous()

    def enter(self, x_BTD: Tensor) -> Tensor:
        if self.sequence_parallel:
            x_TBD = x_BTD.transpose(0, TOKENS).contiguous()
            whole: Tensor = gather_from_sequence_parallel_region(x_TBD, group=self.group)
            return self.crossing.enter(whole.transpose(0, TOKENS))
        x_BTD = apply(OwnGradient, copy_to_tensor_model_parallel_region(x_BTD, self.group))
        return self.crossing.enter(x_BTD)

    def leave(self, y_BTD: Tensor) -> Tensor:
        y_BTD = self.crossing.leave(y_BTD)
        if self.sequence_parallel:
            y_TBD = self.tokens_first(y_BTD)
            own: Tensor = reduce_scatter_to_sequence_parallel_region(y_TBD, self.group)
            return own.transpose(0, TOKENS)
        y_BTD = y_BTD.clone(memory_format=torch.contiguous_format)
        summed: Tensor = reduce_from_tensor_model_parallel_region(y_BTD, self.group)
        return summed

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        whole: Tensor = gather_from_tensor_model_parallel_region(logits, self.group)
        return whole
