"""Resamplers against loops over squares of tokens."""

import pytest
import torch

from core.registry import build, names
from tests.model.reference import agree


def tokens(grid, dim=3):
    return torch.randn(2, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_patch_merging_joins_squares(grid):
    model = build("resample", "patch_merging", dim=3, dim_out=5)

    def slow(p, x_BTD):
        def at(r, c):
            inside = r < grid[0] and c < grid[1]
            return x_BTD[:, r * grid[1] + c] if inside else torch.zeros_like(x_BTD[:, 0])

        merged = []
        for r in range(0, grid[0], 2):
            for c in range(0, grid[1], 2):
                square = torch.cat([at(r, c), at(r + 1, c), at(r, c + 1), at(r + 1, c + 1)], -1)
                centred = square - square.mean(-1, keepdim=True)
                spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                normed = centred / spread * p["norm.gain.weight"] + p["norm.bias.weight"]
                merged.append(normed @ p["reduce.weight"].T)
        return torch.stack(merged, 1)

    agree(model, slow, tokens(grid), call=lambda x: model(x, grid)[0])


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_conv_slides_over_the_grid(grid):
    model = build("resample", {"name": "conv", "kernel": 3}, dim=3, dim_out=5)

    def slow(p, x_BTD):
        out = []
        for r in range(0, grid[0], 2):
            for c in range(0, grid[1], 2):
                total = p["conv.bias"].expand(x_BTD.shape[0], -1)
                for i in range(max(0, r - 1), min(grid[0], r + 2)):
                    for j in range(max(0, c - 1), min(grid[1], c + 2)):
                        weight = p["conv.weight"][:, :, i - r + 1, j - c + 1]
                        total = total + x_BTD[:, i * grid[1] + j] @ weight.T
                out.append(total)
        return torch.stack(out, 1)

    agree(model, slow, tokens(grid), call=lambda x: model(x, grid)[0])


@pytest.mark.parametrize("name", names("resample"))
@pytest.mark.parametrize("grid", [(4, 4), (7, 2), (1, 5)])
def test_the_promised_grid_is_the_grid(name, grid):
    model = build("resample", name, dim=3, dim_out=5)
    y_BTE, found = model(tokens(grid), grid)
    assert found == model.grid(grid)
    assert y_BTE.shape == (2, found[0] * found[1], 5)
