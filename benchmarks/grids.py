"""What a matrix product costs each rank of a grid: analytic numbers beside measured ones.

    python -m benchmarks.grids [--rows N] [--inner N] [--outer N]

The product of a rows × inner input and an inner × outer weight, forward and backward, in float32 on
gloo processes: 1D, by columns and by rows, and 2D on 4 ranks, 2.5D (two squares) and 3D on 8.
`held` is what a rank has of input, weight and output; `kept` is what of it, or besides it, autograd
keeps until the backward pass; `sent` is the least that a rank must send for the collectives that
were seen (a rank's mean). Times would say nothing: processes of one machine share its memory.

Exit code 1 if a measured number is not the analytic one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from evaluation.contracts.ranks import Ranks
from parallel.grids import Grid, cost, matmul, sizes, split
from parallel.traffic import Traffic

FLOAT = 4


@dataclass(frozen=True)
class Case:
    """A row of the table; `form` is a key of `BLOCKS`."""

    name: str
    form: str
    kind: str
    ranks: int
    depth: int | None = None


CASES = [
    Case("1D by columns", "column", "1d", 4),
    Case("1D by rows", "row", "1d", 4),
    Case("2D", "2d", "2d", 4),
    Case("2.5D", "2.5d", "2.5d", 8, depth=2),
    Case("3D", "3d", "3d", 8),
]


@dataclass(frozen=True)
class Costs:
    """Bytes on one rank."""

    held: float
    kept: float
    forward: float
    backward: float


def analytic(case: Case, shape: tuple[int, int, int]) -> Costs:
    """By formula. What is kept for the backward pass is the blocks of input and weight."""
    found = cost(case.form, sizes(case.kind, case.ranks, case.depth), *shape)
    kept = found.input + found.weight
    return Costs(*(float(FLOAT * n) for n in (found.held, kept, found.forward, found.backward)))


def measured(case: Case, shape: tuple[int, int, int]) -> Costs:
    """On a rank of the world."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("grid",))
    grid = Grid.of(case.kind, mesh, case.depth)
    grid = grid if grid.form == case.form else grid.turned()
    rows, inner, outer = shape
    x_ND = split(torch.ones(rows, inner), grid, "input").requires_grad_()
    w_DF = split(torch.ones(inner, outer), grid, "weight").requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Traffic({}) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y_NF = matmul(x_ND, w_DF, grid)
    with Traffic({}) as backward:
        y_NF.backward(torch.ones_like(y_NF))
    return Costs(
        float(sum(t.untyped_storage().nbytes() for t in (x_ND, w_DF, y_NF))),
        float(sum(kept.values())),
        sum(message.sent for message in forward.messages),
        sum(message.sent for message in backward.messages),
    )


def measure(case: Case, shape: tuple[int, int, int]) -> list[Costs]:
    """On every rank of a pool that is started for it."""
    pool = Ranks(case.ranks)
    try:
        found: list[Costs] = pool.run(measured, case, shape)
        return found
    finally:
        pool.close()


def line(case: Case, expected: Costs, found: Costs) -> str:
    """Analytic / measured, in KiB."""
    pairs = zip(vars(expected).values(), vars(found).values(), strict=True)
    cells = (f"{a / 1024:,.1f} / {b / 1024:,.1f}" for a, b in pairs)
    return f"| {case.name} | {case.ranks} | " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.grids", description=(__doc__ or "").splitlines()[0]
    )
    for name, default in (("rows", 256), ("inner", 128), ("outer", 512)):
        parser.add_argument(f"--{name}", type=int, default=default, help="a multiple of 4")
    options = parser.parse_args(arguments)
    shape = options.rows, options.inner, options.outer
    if any(size < 4 or size % 4 for size in shape):
        parser.error("the sizes must be multiples of 4, so that every grid divides them")
    print(
        "A rank's KiB, analytic / measured, for {} × {} by {} × {}:\n".format(
            *shape[:2], *shape[1:]
        )
    )
    print(
        "| layout | ranks | held | kept | sent forward | sent backward |\n|---|---|---|---|---|---|"
    )
    agree = True
    for case in CASES:
        expected, found = analytic(case, shape), measure(case, shape)
        print(line(case, expected, found[0]), flush=True)
        agree &= all(costs == expected for costs in found)
    if not agree:
        print("A rank's measured numbers are not the analytic ones.", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
