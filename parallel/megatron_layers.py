"""Leaves that are megatron-core's layers as well.

`adopt` turns a model's column and row linears, embeddings and heads into instances of Megatron's
`ColumnParallelLinear`, `RowParallelLinear` and `VocabParallelEmbedding`, in place, as FSDP2 does
with the modules that it shards: others hold references to a leaf (a tied head its table), and its
name, its role and its parameters stay. Megatron's own `forward` computes; it is shown this rank's
plain parts of the parameters, which are stored as DTensors.

Two of its habits are set aside. A sublayer enters its region once, however many column linears read
what entered, so a column linear does not gather or reduce by itself. Values come from our seed, so
Megatron's random state is not used.

Axes: B batch, T tokens, F features, N any leading axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from model.leaves import ColumnLinear, Leaf, RowLinear, VocabEmbedding, VocabHead, leaves
from model.roles import Role, roles
from parallel.collectives import Group
from parallel.layout import Layout
from parallel.megatron_operations import MegatronOperations
from parallel.tensor import TOKENS, DataOperations


@contextmanager
def own_parts(leaf: Leaf, dtypes: dict[str, torch.dtype | None] | None = None) -> Iterator[None]:
    """Inside, a leaf's parameters read as this rank computes with them: Megatron knows no DTensor.

    Args:
        dtypes: parameter → what it is converted to; None: as it is.
    """
    shown = {name: leaf.value(name) for name in leaf.roles}
    for name, dtype in (dtypes or {}).items():
        if dtype is not None and name in shown:
            shown[name] = shown[name].to(dtype)
    leaf.__dict__.update(shown)  # found before the registered parameters
    try:
        yield
    finally:
        for name in shown:
            del leaf.__dict__[name]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What products are computed in; explicit, since Megatron's remember autocast on CUDA only."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def rows(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """N,F → rows,F: Megatron's linears take two or three axes."""
    x = x.flatten(0, -2)
    return x if dtype is None else x.to(dtype)


class MegatronColumn(ColumnLinear, ColumnParallelLinear):  # type: ignore[misc]
    """A column linear whose product is Megatron's."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        with own_parts(self, {"weight": dtype, "bias": dtype}):
            y, _ = ColumnParallelLinear.forward(self, rows(x, dtype))
        return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


class MegatronHead(VocabHead, ColumnParallelLinear):  # type: ignore[misc]
    """A vocabulary head, tied or not, whose product is Megatron's, as in its own models."""

    def _local(self, x_BTD: Tensor) -> Tensor:
        tied = self.tied[0]
        dtype = autocast_dtype(x_BTD)
        weight_VD = (self if tied is None else tied).value("weight")
        if dtype is not None:
            weight_VD = weight_VD.to(dtype)
        x_BTD = self.ops.enter(x_BTD)
        with own_parts(self, {"bias": dtype}):
            y, _ = ColumnParallelLinear.forward(self, rows(x_BTD, dtype), weight=weight_VD)
        return y.view(*x_BTD.shape[:-1], -1)  # type: ignore[no-any-return]


class MegatronRow(RowLinear, RowParallelLinear):  # type: ignore[misc]
    """A row linear whose product and all-reduce or reduce-scatter are Megatron's.

    `keeps_product`: selective recomputation keeps the product, which Megatron would all-reduce in
    place, and once more when it recomputes: it reduces a copy.
    """

    keeps_product = False

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
        return y.clone() if self.keeps_product else y

    def forward(self, x: Tensor) -> Tensor:
        dtype, ops = autocast_dtype(x), self.ops
        assert isinstance(ops, DataOperations)
        x = ops.crossing.leave(x)  # which tokens leave; before the product, as it is Megatron's sum
        with own_parts(self, {"weight": dtype}):
            if not self.sequence_parallel:
                y, _ = RowParallelLinear.forward(self, rows(x, dtype))
                return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
            assert isinstance(ops, MegatronOperations)
            x_TBF = ops.tokens_first(x).flatten(1, -2)
            y, _ = RowParallelLinear.forward(self, x_TBF if dtype is None else x_TBF.to(dtype))
        own: Tensor = y.view(-1, x.shape[0], *x.shape[2:-1], y.shape[-1])
        return own.transpose(0, TOKENS)


class MegatronEmbedding(VocabEmbedding, VocabParallelEmbedding):  # type: ignore[misc]
    """A vocabulary embedding whose look-up, mask and sum are Megatron's."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        ops = self.ops
        if self.reduce_scatter_embeddings:
            assert isinstance(ops, MegatronOperations)
            ops.tokens_first(ids_BT)  # for its check
        with own_parts(self):
            x: Tensor = VocabParallelEmbedding.forward(self, ids_BT)
        return x.transpose(0, TOKENS) if self.reduce_scatter_embeddings else x


def adopt(
    model: nn.Module, layout: Layout, group: Group, device: torch.device, recompute: str
) -> None:
    """Make Megatron's layers of the leaves it has layers for; leaves of other classes stay.

    Args:
        group: Megatron's tensor group.
    """
    common: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "use_cpu_initialization": True,  # nothing is allocated: the leaf has its parameters
        "perform_initialization": False,
        "deterministic_mode": device.type == "cuda"
        and torch.are_deterministic_algorithms_enabled(),
    }
    alone = ModelParallelConfig(**common)
    config = ModelParallelConfig(**common, sequence_parallel=layout.sequence_parallel)
    for _, leaf in leaves(model):
        with torch.device("meta"):
            _become(leaf, alone, config, group)
        if isinstance(leaf, MegatronRow):
            leaf.keeps_product = recompute == "selective"


def _become(leaf: Leaf, alone: Any, config: Any, group: Group) -> None:
    """Give a leaf Megatron's attributes and class.

    Args:
        alone: the config of layers that leave messages to the operations.
        config: that of layers that send their own.
    """
    shared: dict[str, Any] = {"init_method": None, "tp_group": group}
    bias = getattr(leaf, "bias", None) is not None
    column = {**shared, "bias": bias, "config": alone, "disable_grad_reduce": True}
    layer: nn.Module
    kind: type[Leaf]
    if type(leaf) is ColumnLinear:
        layer, kind = ColumnParallelLinear(leaf.dim_in, leaf.dim_out, **column), MegatronColumn
    elif type(leaf) is VocabHead:
        column["skip_weight_param_allocation"] = True  # it is given the weight, tied or its own
        layer, kind = ColumnParallelLinear(leaf.dim, leaf.vocab, **column), MegatronHead
    elif type(leaf) is RowLinear:
        row = {"bias": bias, "config": config, "input_is_parallel": True, "skip_bias_add": False}
        layer = RowParallelLinear(leaf.dim_in, leaf.dim_out, **shared, **row)
        kind = MegatronRow
    elif type(leaf) is VocabEmbedding:
        scatter = config.sequence_parallel
        layer = VocabParallelEmbedding(
            leaf.vocab, leaf.dim, **shared, config=config, reduce_scatter_embeddings=scatter
        )
        kind = MegatronEmbedding
    else:
        return
    every = nn.Module().__dict__.keys() | {"weight", "bias"}  # these a leaf has of its own
    leaf.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in every})
    leaf.__class__ = kind


def mark(model: nn.Module, partial: set[str]) -> None:
    """Set on every parameter the attributes by which Megatron's other parts know it.

    Args:
        partial: the parameters whose gradients are partial sums over the tensor axis.
    """
    known: dict[str, Role] = roles(model)
    for name, parameter in model.named_parameters():
        split = known[name].split
        if not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(
                parameter, split is not None, -1 if split is None else split, 1
            )
        parameter.allreduce = True  # type: ignore[attr-defined]
        parameter.sequence_parallel = name in partial  # type: ignore[attr-defined]
