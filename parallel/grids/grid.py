"""A grid of ranks, and which block of a matrix each of them holds.

A product Y = X W has an input X of N rows and width D, a weight W of D rows and width F, and an
output Y. `BLOCKS` says for each of them which axes of the grid divide its rows and its columns. A
rank's block of a matrix is found from its places on those axes; ranks that differ only on other
axes hold copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from core.errors import UserError, hint

Group = dist.ProcessGroup
KINDS = ("1d", "2d", "2.5d", "3d")
Matrix = Literal["input", "weight", "output"]


class Division(NamedTuple):
    """The axes that divide a matrix's rows, and its columns, the outermost first."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        return self.rows + self.columns


BLOCKS: dict[str, dict[Matrix, Division]] = {
    # Megatron: the weight is divided, and the narrow side of the pair of products is whole.
    "column": {
        "input": Division(),
        "weight": Division(columns=("line",)),
        "output": Division(columns=("line",)),
    },
    "row": {
        "input": Division(columns=("line",)),
        "weight": Division(rows=("line",)),
        "output": Division(),
    },
    # `row` is the index of a row of blocks: the ranks along `column` have blocks of one row.
    "2d": {
        "input": Division(("row",), ("column",)),
        "weight": Division(("row",), ("column",)),
        "output": Division(("row",), ("column",)),
    },
    "2.5d": {
        "input": Division(("depth", "row"), ("column",)),
        "weight": Division(("row",), ("column",)),
        "output": Division(("depth", "row"), ("column",)),
    },
    # Each axis is called after the matrix that travels along it.
    "3d": {
        "input": Division(("weight", "input"), ("output",)),
        "weight": Division(("output",), ("input", "weight")),
        "output": Division(("weight", "output"), ("input",)),
    },
}
"""Form of a grid → matrix → how it is divided; the kind 1d has two forms, which take turns."""


def sizes(kind: str, processes: int, depth: int | None = None) -> dict[str, int]:
    """The axes of a grid of that many processes, slowest first, and their sizes.

    Args:
        kind: 1d, 2d (a square q × q), 2.5d (`depth` squares) or 3d (a cube).
        processes: how many ranks the grid has.
        depth: how many squares a 2.5d grid has.

    Raises:
        UserError: if there is no such grid; it says how many processes there could be.
    """
    if kind not in KINDS:
        raise UserError(f"grids: there is no kind {kind!r}{hint(kind, KINDS)}")
    if (depth is not None) != (kind == "2.5d"):
        problem = "needs a depth, the number of its squares" if depth is None else "has no depth"
        raise UserError(f"grids: a {kind} grid {problem}")
    if kind == "1d":
        return {"line": processes}
    if kind == "2d":
        side = math.isqrt(processes)
        _exact(kind, "a square", processes, side**2, (side + 1) ** 2)
        return {"row": side, "column": side}
    if kind == "3d":
        side = max(n for n in range(1, processes + 1) if n**3 <= processes)
        _exact(kind, "a cube", processes, side**3, (side + 1) ** 3)
        return dict.fromkeys(("weight", "input", "output"), side)
    assert depth is not None
    possible = [
        d for d in range(1, processes + 1) if math.isqrt(processes // d) ** 2 * d == processes
    ]
    if depth not in possible:
        shown = " or ".join(map(str, possible))
        raise UserError(
            f"grids: {processes} processes are not {depth} squares; with that many, a depth of "
            f"{shown} gives a 2.5d grid"
        )
    side = math.isqrt(processes // depth)
    return {"depth": depth, "row": side, "column": side}


def _exact(kind: str, shape: str, processes: int, below: int, above: int) -> None:
    if processes != below:
        raise UserError(
            f"grids: a {kind} grid is {shape}, and {processes} processes are not; "
            f"use {below} or {above}"
        )


@dataclass(frozen=True)
class Grid:
    """This rank's place in a grid.

    form: a key of `BLOCKS`.
    groups: axis → the ranks that differ from this one on that axis alone.
    """

    form: str
    groups: dict[str, Group]

    @classmethod
    def of(cls, kind: str, mesh: DeviceMesh, depth: int | None = None) -> Grid:
        """The grid made of the ranks of a mesh of one dimension, which has a name; a collective.

        Raises:
            UserError: if the ranks do not make such a grid (see `sizes`).
        """
        assert mesh.ndim == 1 and mesh.mesh_dim_names, (
            "a grid's mesh has one dimension, with a name"
        )
        axes = sizes(kind, mesh.size(), depth)
        form = "column" if kind == "1d" else kind
        if len(axes) == 1:
            return cls(form, {axis: mesh.get_group() for axis in axes})
        inner = mesh._unflatten(0, tuple(axes.values()), tuple(axes))
        return cls(form, {axis: inner.get_group(axis) for axis in axes})

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → how many ranks it has."""
        return {axis: group.size() for axis, group in self.groups.items()}

    def turned(self) -> Grid:
        """The grid for the next product, whose input is divided as this one's output is.

        1D changes from columns to rows and back; 3D exchanges the two axes along which input and
        output travel; 2D and 2.5D stay.
        """
        if self.form in ("column", "row"):
            return replace(self, form="row" if self.form == "column" else "column")
        if self.form == "3d":
            swapped = {"input": self.groups["output"], "output": self.groups["input"]}
            return replace(self, groups=self.groups | swapped)
        return self
