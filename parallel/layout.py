"""The layout: how many processes each axis has, and where this process stands.

Ranks are laid out with the tensor axis fastest, so that its ranks are neighbours (one node), then
`fsdp`, then `replicate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import UserError

if TYPE_CHECKING:
    from parallel.config import ParallelConfig

AXES = ("replicate", "fsdp", "tp")


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes and this rank's place; replicate · fsdp · tp is the number of processes."""

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    rank: int = 0

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.replicate * self.fsdp * self.tp

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes in the order of `AXES`."""
        return (self.replicate, self.fsdp, self.tp)

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's index on every axis."""
        rest, tp = divmod(self.rank, self.tp)
        replicate, fsdp = divmod(rest, self.fsdp)
        return {"replicate": replicate, "fsdp": fsdp, "tp": tp}

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank reads; alike over the tensor axis."""
        return self.rank // self.tp

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is divided."""
        return self.replicate * self.fsdp

    def __str__(self) -> str:
        suffix = " with sequence parallelism" if self.sequence_parallel else ""
        return f"replicate {self.replicate} × fsdp {self.fsdp} × tp {self.tp}{suffix}"

    @classmethod
    def of(cls, config: ParallelConfig, world: int, rank: int = 0) -> Layout:
        """The layout of `world` processes.

        Raises:
            UserError: if the axes do not multiply to `world`; it names a layout that does.
        """
        sizes = {axis: getattr(config, axis) for axis in AXES}
        free = [axis for axis, size in sizes.items() if size == -1]
        fixed = 1
        for size in sizes.values():
            fixed *= max(size, 1)
        named = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
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
        return cls(**sizes, sequence_parallel=config.sequence_parallel, rank=rank)


def _nearest(config: ParallelConfig, sizes: dict[str, int], world: int) -> str:
    """The layout of `world` processes closest to what was asked for, as overrides."""
    tp = max(size for size in range(1, sizes["tp"] + 1) if world % size == 0)
    left = world // tp
    wanted = max(sizes["replicate"], 1)
    replicate = max(size for size in range(1, wanted + 1) if left % size == 0)
    return f"parallel.replicate={replicate} parallel.fsdp={left // replicate} parallel.tp={tp}" + (
        " parallel.sequence_parallel=false" if config.sequence_parallel and tp == 1 else ""
    )
