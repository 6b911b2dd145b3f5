"""1D: the weight divided along one axis (Megatron-LM; Shoeybi et al., 2019, arXiv:1909.08053).

Two products make a pair. In the first, by columns, each of p ranks holds all of X and F/p columns
of W, and has F/p columns of Y; the gradients of X are summed. In the second, by rows, it holds D/p
columns of X and D/p rows of W, and the outputs are summed. Weights take 1/p of their memory; what
enters and leaves the pair is on every rank.

Axes: N rows, D the input's width, F the output's; of a rank's own blocks.
"""

from __future__ import annotations

from torch import Tensor

from parallel.collectives import Copy, Group, Reduce, apply


def by_columns(x_ND: Tensor, w_DF: Tensor, line: Group) -> Tensor:
    """This rank's columns of Y. Sent: 2 (p−1)/p of X, backward."""
    return apply(Copy, x_ND, line) @ w_DF


def by_rows(x_ND: Tensor, w_DF: Tensor, line: Group) -> Tensor:
    """All of Y. Sent: 2 (p−1)/p of Y, forward."""
    return apply(Reduce, x_ND @ w_DF, line, False)
