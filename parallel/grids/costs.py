"""What a product costs each rank: elements held and elements sent.

Sent is the least for each collective, as `parallel.traffic.Message.sent` counts it: of n ranks each
passes on (n−1)/n of what is gathered, broadcast or reduced, and twice that of what is reduced to
all. A broadcast is counted on every rank alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.grids.grid import BLOCKS, Matrix


@dataclass(frozen=True)
class Cost:
    """Elements on one rank.

    input, weight, output: of the blocks it holds.
    forward, backward: sent in each pass, where both input and weight need gradients.
    """

    input: int
    weight: int
    output: int
    forward: float
    backward: float

    @property
    def held(self) -> int:
        return self.input + self.weight + self.output

    @property
    def sent(self) -> float:
        return self.forward + self.backward


def cost(form: str, axes: Mapping[str, int], rows: int, inner: int, outer: int) -> Cost:
    """The cost of a product of rows × inner by inner × outer.

    Args:
        form: a key of `BLOCKS`: column, row, 2d, 2.5d or 3d.
        axes: the grid's axes and their sizes, as `sizes` gives them.
        rows: of the input.
        inner: the input's width.
        outer: the output's width.
    """
    whole: dict[Matrix, int] = {
        "input": rows * inner,
        "weight": inner * outer,
        "output": rows * outer,
    }
    x, w, y = (
        whole[what] // math.prod(axes[axis] for axis in BLOCKS[form][what].axes) for what in whole
    )
    if form == "column":
        return Cost(x, w, y, 0.0, _all_reduce(x, axes["line"]))
    if form == "row":
        return Cost(x, w, y, _all_reduce(y, axes["line"]), 0.0)
    if form == "3d":
        others = axes["input"] - 1
        return Cost(x, w, y, others * (x + w + y), others * (2 * x + 2 * w + y))
    others = axes["row"] - 1
    depth = _all_reduce(w, axes.get("depth", 1))
    return Cost(x, w, y, others * (x + w), 2 * others * (x + w) + depth)


def _all_reduce(elements: int, ranks: int) -> float:
    return 2 * elements * (ranks - 1) / ranks
