"""The layout: how many processes each axis has, and where this process stands.

Ranks are laid out with the tensor axis fastest, so that its ranks are neighbours (one node), and
with pipeline stages slowest, since they talk least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import UserError

if TYPE_CHECKING:
    from parallel.config import ParallelConfig

AXES = ("pp", "replicate", "fsdp", "ep", "cp", "tp")
"""The axes, slowest first."""
DATA = ("replicate", "fsdp", "ep")
"""The axes that split the batch."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes and this rank's place; their product is the number of processes."""

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    cp_method: str = "ring"
    rank: int = 0

    @property
    def world(self) -> int:
        """The number of processes."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's index on every axis."""
        rest, found = self.rank, {}
        for axis, size in reversed(list(zip(AXES, self.shape, strict=True))):
            rest, found[axis] = divmod(rest, size)
        return found

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank reads; alike over the other axes."""
        index, at = 0, self.coordinates
        for axis in DATA:
            index = index * getattr(self, axis) + at[axis]
        return index

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is divided."""
        return self.replicate * self.fsdp * self.ep

    @property
    def shard(self) -> int:
        """Between how many ranks FSDP divides what is no expert: all that hold the same of it.

        Ranks of `ep` and `cp` hold it alike as those of `fsdp` do, so they share its storage.
        """
        return self.fsdp * self.ep * self.cp

    @property
    def shard_rank(self) -> int:
        at = self.coordinates
        return (at["fsdp"] * self.ep + at["ep"]) * self.cp + at["cp"]

    @property
    def expert_shard(self) -> int:
        """Between how many ranks FSDP divides experts: those that hold the same ones."""
        return self.fsdp * self.cp

    @property
    def expert_shard_rank(self) -> int:
        at = self.coordinates
        return at["fsdp"] * self.cp + at["cp"]

    def __str__(self) -> str:
        shown = {"replicate": self.replicate, "fsdp": self.fsdp, "tp": self.tp}
        shown |= {axis: n for axis in ("pp", "ep", "cp") if (n := getattr(self, axis)) > 1}
        suffix = " with sequence parallelism" if self.sequence_parallel else ""
        return " × ".join(f"{axis} {size}" for axis, size in shown.items()) + suffix

    @classmethod
    def of(cls, config: ParallelConfig, world: int, rank: int = 0) -> Layout:
        """The layout of `world` processes.

        Raises:
            UserError: if the axes do not multiply to `world`; it names a layout that does.
        """
        sizes = {axis: getattr(config, axis) for axis in AXES}
        free = [axis for axis, size in sizes.items() if size == -1]
        fixed = math.prod(max(size, 1) for size in sizes.values())
        kept = {a: s for a, s in sizes.items() if s != 1 or a in ("replicate", "fsdp", "tp")}
        named = " × ".join(f"{axis} {kept[axis]}" for axis in _SHOWN if axis in kept)
        count = "1 process" if world == 1 else f"{world} processes"
        nearest = _nearest(config, sizes, world)
        if free and world % fixed == 0:
            sizes[free[0]] = world // fixed
        elif free and world < fixed:
            raise UserError(
                f"parallel: {named} needs at least {fixed} processes, but there are {world}; "
                f"start {fixed}, or set {nearest}"
            )
        elif free:
            raise UserError(
                f"parallel: {count} cannot be divided into {named}: {world} is not a multiple "
                f"of {fixed}; start {world - world % fixed}, or set {nearest}"
            )
        elif fixed < world:
            grows = world % (fixed // sizes["fsdp"]) == 0
            instead = "parallel.fsdp=-1" if grows else nearest
            raise UserError(
                f"parallel: {named} needs {fixed}, but there are {count}: more processes than the "
                f"layout needs; start {fixed}, or set {instead}"
            )
        elif fixed > world:
            raise UserError(
                f"parallel: {named} needs {fixed} processes, but there are {world}; "
                f"start {fixed}, or set {nearest}"
            )
        return cls(
            **sizes,
            sequence_parallel=config.sequence_parallel,
            cp_method=config.cp_method,
            rank=rank,
        )


_SHOWN = ("replicate", "fsdp", "tp", "pp", "ep", "cp")


def _nearest(config: ParallelConfig, sizes: dict[str, int], world: int) -> str:
    """The layout of `world` processes closest to what was asked for, as overrides."""
    left, found = world, {}
    for axis in ("tp", "pp", "cp", "ep", "replicate"):
        wanted = max(sizes[axis], 1)
        found[axis] = max(size for size in range(1, wanted + 1) if left % size == 0)
        left //= found[axis]
    shown = ["replicate", "fsdp", "tp", *(a for a in ("pp", "ep", "cp") if sizes[a] > 1)]
    found["fsdp"] = left
    alone = " parallel.sequence_parallel=false"
    return " ".join(f"parallel.{axis}={found[axis]}" for axis in shown) + (
        alone if config.sequence_parallel and found["tp"] == 1 else ""
    )
