"""Two products with a ReLU between them, on a grid of ranks and on one process.

N rows, D, F and G the widths; all differ, and on the grids tried none of them can be mistaken.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from evaluation.contracts.ranks import Ranks
from parallel.grids import Grid, cost, join, matmul, split
from parallel.traffic import Traffic

N, D, F, G = 16, 12, 8, 20
FLOAT = 4


@functools.cache
def grid_on_a_rank(kind: str, depth: int | None) -> Grid:
    """Groups are made once in a process."""
    world = torch.distributed.get_world_size()
    return Grid.of(kind, init_device_mesh("cpu", (world,), mesh_dim_names=("grid",)), depth)


def matrices() -> dict[str, Tensor]:
    """x_ND, w_DF, v_FG and the gradient of y_NG, alike on every rank."""
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (N, D), "w": (D, F), "v": (F, G), "dy": (N, G)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def serial() -> dict[str, Tensor]:
    """The output and all gradients on one process."""
    whole = matrices()
    x, w, v = (whole[name].requires_grad_() for name in "xwv")
    y = torch.relu(x @ w) @ v
    y.backward(whole["dy"])
    return {"y": y.detach(), "dx": x.grad, "dw": w.grad, "dv": v.grad}  # type: ignore[dict-item]


def on_a_rank(kind: str, depth: int | None = None) -> dict[str, Any]:
    """The same on a grid: joined results, blocks' elements, bytes sent and what autograd keeps."""
    first, whole = grid_on_a_rank(kind, depth), matrices()
    second = first.turned()
    x = split(whole["x"], first, "input").requires_grad_()
    w = split(whole["w"], first, "weight").requires_grad_()
    v = split(whole["v"], second, "weight").requires_grad_()
    dy = split(whole["dy"], second, "output")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // FLOAT
        return tensor

    with Traffic({}) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        h = torch.relu(matmul(x, w, first))
        y = matmul(h, v, second)
    with Traffic({}) as backward:
        y.backward(dy)
    assert x.grad is not None and w.grad is not None and v.grad is not None
    return {
        "y": join(y.detach(), second, "output"),
        "dx": join(x.grad, first, "input"),
        "dw": join(w.grad, first, "weight"),
        "dv": join(v.grad, second, "weight"),
        "elements": {
            "x": x.numel(),
            "w": w.numel(),
            "h": h.numel(),
            "v": v.numel(),
            "y": y.numel(),
        },
        "kept": sum(kept.values()),
        "forward": sum(message.sent for message in forward.messages) / FLOAT,
        "backward": sum(message.sent for message in backward.messages) / FLOAT,
        "costs": (
            cost(first.form, first.sizes, N, D, F),
            cost(second.form, second.sizes, N, F, G),
        ),
    }


def prove(ranks: Ranks, kind: str, depth: int | None = None) -> dict[str, int]:
    """Every rank has the serial results and the stated costs; the elements of a rank's blocks."""
    expected, held = serial(), {}
    for found in ranks.run(on_a_rank, kind, depth):
        for name, value in expected.items():
            worst = (found[name] - value).abs().max() / value.abs().max()
            assert worst < 1e-5, f"{name} is off by {worst:.1e}"
        first, second = found["costs"]
        assert found["forward"] == first.forward + second.forward
        assert found["backward"] == first.backward + second.backward
        held = found["elements"]
        assert (held["x"], held["w"], held["h"]) == (first.input, first.weight, first.output)
        assert (held["h"], held["v"], held["y"]) == (second.input, second.weight, second.output)
        # Nothing that was gathered stays: the blocks of x, w, v, and h, which ReLU needs as well.
        assert found["kept"] == sum(held.values()) - held["y"]
    return held
