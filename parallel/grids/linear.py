"""The product on any grid, and matrices cut into blocks for it and joined again.

Gradients are whole: of its block of the input or the weight every rank gets the gradient of the one
product, copies get equal ones, and nothing is left to sum. The gradient that comes to an output
must be alike on its copies, as it is where each rank computes the same loss of the whole output.

Axes: N rows, D the input's width, F the output's. A weight is D × F: rows for the input's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.errors import UserError
from parallel.collectives import all_gather, apply, part
from parallel.grids.cube import Cube
from parallel.grids.deep import deep
from parallel.grids.grid import BLOCKS, Grid, Matrix
from parallel.grids.line import by_columns, by_rows
from parallel.grids.summa import Summa


def matmul(x_ND: Tensor, w_DF: Tensor, grid: Grid) -> Tensor:
    """This rank's block of Y = X W; a collective, as is its backward pass.

    Args:
        x_ND: this rank's block of the input.
        w_DF: this rank's block of the weight.
        grid: how they are divided; `grid.turned()` is for the product that takes the result.

    Raises:
        UserError: if the blocks do not fit together.
    """
    if x_ND.dim() != 2 or w_DF.dim() != 2 or x_ND.shape[1] != w_DF.shape[0]:
        raise UserError(
            f"grids: blocks of {tuple(x_ND.shape)} and {tuple(w_DF.shape)} cannot be multiplied; "
            "were both split on the grid of this product (grid.turned() after each product)?"
        )
    groups = grid.groups
    if grid.form == "column":
        return by_columns(x_ND, w_DF, groups["line"])
    if grid.form == "row":
        return by_rows(x_ND, w_DF, groups["line"])
    if grid.form == "2d":
        return apply(Summa, x_ND, w_DF, groups["row"], groups["column"])
    if grid.form == "2.5d":
        return deep(x_ND, w_DF, groups["depth"], groups["row"], groups["column"])
    return apply(Cube, x_ND, w_DF, groups["weight"], groups["input"], groups["output"])


@torch.no_grad()
def split(whole: Tensor, grid: Grid, what: Matrix) -> Tensor:
    """This rank's block of a matrix that every rank holds; a copy, without communication.

    Args:
        whole: two dimensions.
        grid: that of the product in which the matrix takes part.
        what: `input`, `weight` or `output` of that product.

    Raises:
        UserError: if the matrix cannot be divided into equal blocks.
    """
    division, block = BLOCKS[grid.form][what], whole
    for dim, axes in enumerate(division):
        for axis in axes:
            size = grid.groups[axis].size()
            if block.shape[dim] % size:
                side = ("rows", "columns")[dim]
                pieces = "×".join(str(grid.groups[name].size()) for name in axes)
                raise UserError(
                    f"grids: the {what}'s {whole.shape[dim]} {side} cannot be divided between "
                    f"{pieces} ranks; use a multiple"
                )
            block = part(block, dim, grid.groups[axis])
    return block.clone()


@torch.no_grad()
def join(block: Tensor, grid: Grid, what: Matrix) -> Tensor:
    """The whole matrix, on every rank, from the ranks' blocks: `split` undone; a collective."""
    for dim, axes in enumerate(BLOCKS[grid.form][what]):
        for axis in reversed(axes):
            block = all_gather(block, dim, grid.groups[axis])
    return block
