"""3D: a cube of l³ ranks (Bian et al., 2021, arXiv:2105.14450).

Rank (i, j, k) holds a p-th of each matrix, p = l³:

    X: of row block i its part j, column block k      gathered along j to X_ik
    W: row block k, of column block j its part i      gathered along i to W_kj
    Y: of row block i its part k, column block j      X_ik W_kj, summed and scattered along k

The axes are called after what travels along them: i `weight`, j `input`, k `output`. Y is divided
as X is, but with j and k exchanged, so the next product is computed on the grid `turned`. What is
gathered is not kept: the backward pass gathers X and W again, so that between the passes a rank
holds its blocks alone.

Axes: N rows, D the input's width, F the output's; of a rank's own blocks, unless gathered (l times
the rows of X, and the columns of W).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from parallel.collectives import Group, all_gather, reduce_scatter

ROWS, COLUMNS = 0, 1


class Cube(Function):
    """Y = X W. Sent: (l−1) blocks of X, W and Y forward, and of X twice, W twice, Y backward."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_DF: Tensor, weight: Group, input: Group, output: Group
    ) -> Tensor:
        ctx.save_for_backward(x_ND, w_DF)
        ctx.groups = weight, input, output
        partial = all_gather(x_ND, ROWS, input) @ all_gather(w_DF, COLUMNS, weight)
        return reduce_scatter(partial, ROWS, output)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Any:
        x_ND, w_DF = ctx.saved_tensors
        weight, input, output = ctx.groups
        grad = all_gather(grad_NF, ROWS, output)
        grad_ND = grad_DF = None
        if ctx.needs_input_grad[0]:
            grad_ND = reduce_scatter(grad @ all_gather(w_DF, COLUMNS, weight).T, ROWS, input)
        if ctx.needs_input_grad[1]:
            grad_DF = reduce_scatter(all_gather(x_ND, ROWS, input).T @ grad, COLUMNS, weight)
        return grad_ND, grad_DF, None, None, None
