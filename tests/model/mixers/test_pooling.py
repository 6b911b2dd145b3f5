"""The pooling mixer against its formula."""

import pytest
import torch

from core.errors import UserError
from core.registry import build
from model.mixers.pooling import Pooling
from model.stream import Stream
from tests.model.reference import agree


@pytest.mark.parametrize(("grid", "size"), [((4, 4), 3), ((3, 5), 3), ((5, 4), 5), ((1, 1), 3)])
def test_pooling_is_the_mean_of_the_neighbours_less_the_token(grid, size):
    rows, columns = grid
    x = torch.randn(2, rows * columns, 6, generator=torch.Generator().manual_seed(0))

    def slow(p, x_BTD):
        out = []
        for r in range(rows):
            for c in range(columns):
                near = [
                    x_BTD[:, i * columns + j]
                    for i in range(rows)
                    for j in range(columns)
                    if max(abs(i - r), abs(j - c)) <= size // 2
                ]
                out.append(sum(near) / len(near) - x_BTD[:, r * columns + c])
        return torch.stack(out, 1)

    mixer = Pooling(grid, size=size)
    agree(mixer, slow, x, call=lambda x: mixer(x, Stream(x, grid=grid)))


def test_a_constant_image_pools_to_nothing():
    x = torch.ones(1, 12, 4)
    assert Pooling((3, 4))(x, Stream(x, grid=(3, 4))).abs().max() < 1e-6


def test_mistakes_are_told():
    with pytest.raises(UserError, match="must be odd"):
        build("mixer", {"name": "pooling", "size": 2}, grid=(4, 4))
    with pytest.raises(UserError, match="needs the grid"):
        Pooling(None)
