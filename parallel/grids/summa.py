"""2D: matrices in q × q blocks (SUMMA, in Optimus: Xu et al., 2021, arXiv:2104.05343).

Rank (i, j) holds the blocks X_ij, W_ij and Y_ij, a p-th of each matrix where p = q². Nothing is
held twice, weights or activations. In each product step k of q moves one row or column of blocks:

    Y_ij  = Σ_k X_ik W_kj     X_ik along row i of the grid, W_kj along column j
    dX_ik = Σ_j dY_ij W_kjᵀ   W_kj along column j, the products summed along row i to rank k
    dW_kj = Σ_i X_ikᵀ dY_ij   X_ik along row i, the products summed along column j to rank k

Besides its own a rank has one block of each at a time. Blocks are not kept for the backward pass
but sent again.

Axes: N rows, D the input's width, F the output's; of a rank's own blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function

from parallel.collectives import Group, settled


class Summa(Function):
    """Y = X W. Sent, each counted once: (q−1) blocks of X and W forward, twice that backward.

    row: the ranks with this one's column of blocks, by their row.
    column: the ranks with this one's row of blocks, by their column.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_DF: Tensor, row: Group, column: Group) -> Tensor:
        ctx.save_for_backward(x_ND, w_DF)
        ctx.row, ctx.column = row, column
        y_NF = x_ND.new_zeros(x_ND.shape[0], w_DF.shape[1])
        for k in range(column.size()):
            y_NF.addmm_(_spread(x_ND, k, column), _spread(w_DF, k, row))
        return y_NF

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Any:
        x_ND, w_DF = ctx.saved_tensors
        row, column = ctx.row, ctx.column
        grad_ND = grad_DF = None
        if ctx.needs_input_grad[0]:
            grad_ND = torch.empty_like(x_ND)
            for k in range(column.size()):
                _collect(grad_NF @ _spread(w_DF, k, row).T, k, column, grad_ND)
        if ctx.needs_input_grad[1]:
            grad_DF = torch.empty_like(w_DF)
            for k in range(row.size()):
                _collect(_spread(x_ND, k, column).T @ grad_NF, k, row, grad_DF)
        return grad_ND, grad_DF, None, None


def _spread(block: Tensor, source: int, group: Group) -> Tensor:
    """The block of that rank of the group, on all of them."""
    return settled(functional.broadcast(block.contiguous(), source, group))


def _collect(partial: Tensor, target: int, group: Group, total: Tensor) -> None:
    """Write the sum over the group into that rank's `total`."""
    dist.reduce(partial, group=group, group_dst=target)
    if group.rank() == target:
        total.copy_(partial)
