"""Relative position bias over a grid (Liu et al. 2021, 2103.14030).

Axes: B batch, H heads, T queries, S keys; h rows and w columns of the grid.
"""

from __future__ import annotations

from torch import Tensor

from core.errors import UserError
from core.registry import register
from model.leaves import HeadParameter
from model.positions.base import Position

_LANGUAGE = "rows and columns exist on an image's grid only; use relative_bias for text"


@register(
    "position",
    "relative_grid",
    paper="2103.14030",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    aliases=["relative_bias_2d"],
    cannot={"language": _LANGUAGE},
)
class RelativeGridBias(Position):
    """A trained score per head and per distance in rows and columns.

    bias[t, s] = table[(rows from s to t) + h − 1, (columns from s to t) + w − 1]

    In window attention the grid is the window. Tokens beside the grid (a class token) have no
    place in it.
    """

    place = "attention"
    biases = True

    def __init__(self, heads: int, grid: tuple[int, int] | None, max_length: int | None = None):
        super().__init__()
        if grid is None:
            raise UserError(f"position relative_grid: {_LANGUAGE}")
        if max_length is not None and max_length != grid[0] * grid[1]:
            raise UserError(
                "position relative_grid: a class token has no place in the grid; use pool: mean"
            )
        self.grid = grid
        self.table = HeadParameter(heads, 2 * grid[0] - 1, 2 * grid[1] - 1, fill="embedding")

    def per_head(self) -> Tensor:
        table_Hhw: Tensor = self.table()
        return table_Hhw

    def form(self, per_head: Tensor, queries_BT: Tensor, keys_BS: Tensor) -> Tensor:
        rows, columns = self.grid
        q, k = queries_BT[:, :, None], keys_BS[:, None, :]
        down_BTS = q // columns - k // columns + rows - 1
        right_BTS = q % columns - k % columns + columns - 1
        index_BTS = down_BTS * (2 * columns - 1) + right_BTS
        return per_head.flatten(1)[:, index_BTS].transpose(0, 1)
