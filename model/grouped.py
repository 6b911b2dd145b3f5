"""Products of rows, grouped by expert, with each expert's matrix.

Axes: P rows, I and O the matrix' axes, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def one_kernel(x: Tensor) -> bool:
    """Whether all experts' products are one kernel here: bfloat16 on a GPU.

    Then the counts are not needed on the host.
    """
    return x.is_cuda and product_dtype(x) == torch.bfloat16


def grouped_product(
    x_PI: Tensor, weight_EIO: Tensor, count_E: Tensor, counts: list[int] | None
) -> Tensor:
    """y_PO: the first count_0 rows times expert 0's matrix, and so on.

    Args:
        counts: `count_E` on the host; None where `one_kernel`.
    """
    dtype = product_dtype(x_PI)
    x_PI, weight_EIO = x_PI.to(dtype), weight_EIO.to(dtype)
    if counts is None:
        return F.grouped_mm(x_PI, weight_EIO, offs=count_E.cumsum(0).to(torch.int32))
    y_PO: Tensor = _product(x_PI, weight_EIO, counts)
    return y_PO


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a matrix product of x is computed here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class GroupedProduct(Function):
    """A loop over experts that writes each one's rows, and gradients, where they belong.

    Splitting and concatenating would copy every row and, in the backward pass, every weight.
    """

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_PI, weight_EIO)
        ctx.counts = counts
        y_PO = x_PI.new_empty(x_PI.shape[0], weight_EIO.shape[2])
        for y, x, weight in _groups(counts, (y_PO, x_PI), weight_EIO):
            torch.mm(x, weight, out=y)
        return y_PO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PO: Tensor) -> Any:
        x_PI, weight_EIO = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_PI)
            for gx, g, weight in _groups(ctx.counts, (grad_x, grad_PO), weight_EIO):
                torch.mm(g, weight.mT, out=gx)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight_EIO)
            for x, g, gw in _groups(ctx.counts, (x_PI, grad_PO), grad_weight):
                torch.mm(x.mT, g, out=gw)  # zero for an expert without rows
        return grad_x, grad_weight, None


def _groups(counts: list[int], rows: tuple[Tensor, Tensor], experts_E: Tensor) -> Any:
    """For each expert its rows of both tensors, and its own matrix."""
    return zip(*(x.split(counts) for x in rows), experts_E.unbind(), strict=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _product(x_PI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Any:
    # Every step has other counts, so a compiled loop would be compiled again and again.
    return GroupedProduct.apply(x_PI, weight_EIO, counts)  # type: ignore[no-untyped-call]
