"""Matrix products divided over grids of ranks: 1D, 2D, 2.5D and 3D, as functions with autograd.

The engine's tensor axis is 1D (`parallel/tensor.py`); these stand beside it, for code of one's own.

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("grid",))  # or one axis of another mesh
    grid = Grid.of("2d", mesh)
    x, w1, w2 = split(x_ND, grid, "input"), split(w_DF, grid, "weight"), …
    h = torch.relu(matmul(x, w1, grid))
    grid = grid.turned()  # what one product gives is what the next one takes
    y_NG = join(matmul(h, w2, grid), grid, "output")
"""

from parallel.grids.costs import Cost, cost
from parallel.grids.grid import Grid, sizes
from parallel.grids.linear import join, matmul, split

__all__ = ["Cost", "Grid", "cost", "join", "matmul", "sizes", "split"]
