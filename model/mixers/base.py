"""The mixer protocol."""

from __future__ import annotations

from torch import Tensor, nn

from core.errors import UserError
from model.context import Need
from model.stream import Stream


class Mixer(nn.Module):
    """f(x_BTD, stream) → y_BTD inside the region: all tokens, this rank's heads or channels.

    A mixer ends in a `RowLinear`, or calls `leave`/`leave_alike` on what it returns. It may read
    the stream and set its `carried`, `losses` and `metrics`.
    """

    caches: bool = False
    """Whether it can decode one token at a time from `stream.cache`."""
    multiway: bool = False
    """Whether `forward` also takes inputs of their own for the keys and for the values."""
    context: Need = "gather"
    """What it needs of other ranks' tokens under context parallelism."""
    selectors: tuple[str, ...] = ("q", "k")
    """Names of the leaves that only decide who is seen; a placement's `gain` leaves them alone."""

    def forward(self, x_BTD: Tensor, stream: Stream) -> Tensor:
        raise NotImplementedError

    def math_flops(self, batch: int, tokens: int) -> int:
        """Forward operations that no leaf counts, such as the scores of attention."""
        return 0

    def forward_math_flops(self, x_BTD: Tensor, stream: Stream, *others: Tensor) -> int:
        """`math_flops` of one call; for mixers where they depend on more than x's shape."""
        return self.math_flops(x_BTD.shape[0], x_BTD.shape[1])


def image_grid(
    mixer: str, grid: tuple[int, int] | None, tokens: int | None = None
) -> tuple[int, int]:
    """The grid of a mixer that needs one, and needs every token to stand in it.

    Raises:
        UserError: where there is no grid, or tokens beside it.
    """
    if grid is None:
        raise UserError(f"mixer {mixer} needs the grid of an image's tokens: use kind: vision")
    if tokens is not None and tokens != grid[0] * grid[1]:
        raise UserError(f"mixer {mixer}: a class token has no place in the grid; use pool: mean")
    return grid
