"""2.5D: d grids of q × q, each with its share of the rows (Tesseract: Wang et al., 2021,
arXiv:2105.14500).

Of p = d q² ranks, (h, i, j) holds the block at row h q + i and column j of X and Y, a p-th of each,
and W_ij, which is a q²-th: each of the d grids has all of the weight. A grid multiplies its rows as
in 2D, q steps with blocks d times smaller, and the gradients of the weights are summed over depth.
With d = 1 it is 2D, with q = 1 data parallelism.

Axes: N rows, D the input's width, F the output's; of a rank's own blocks.
"""

from __future__ import annotations

from torch import Tensor

from parallel.collectives import Copy, Group, apply
from parallel.grids.summa import Summa


def deep(x_ND: Tensor, w_DF: Tensor, depth: Group, row: Group, column: Group) -> Tensor:
    """This rank's block of Y. Sent: as in 2D, and 2 (d−1)/d of the weight's block, backward."""
    return apply(Summa, x_ND, apply(Copy, w_DF, depth), row, column)
