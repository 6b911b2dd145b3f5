"""Sinusoidal positions against the formula, one number at a time."""

import math

import pytest
import torch

from core.errors import UserError
from model.positions.sinusoidal import SinusoidalPosition
from tests.model.reference import agree


def value(position, channel, width, base):
    angle = position / base ** (2 * (channel // 2) / width)
    return math.cos(angle) if channel % 2 else math.sin(angle)


@pytest.mark.parametrize("positions", [None, [[5, 0, 1], [2, 40, 7]]])
def test_on_a_line(positions):
    at = torch.tensor(positions) if positions else None
    x = torch.randn(2, 3 if positions else 63, 6)
    rows = positions or [list(range(63))]
    table = torch.tensor([[[value(p, c, 6, 100.0) for c in range(6)] for p in r] for r in rows])
    module = SinusoidalPosition(6, base=100.0)
    # Angles are computed in float32.
    agree(module, lambda _, x: x + table, x, call=lambda x: module.embed(x, at), tolerance=1e-5)


@pytest.mark.parametrize("prefix", [0, 1])
def test_on_a_grid(prefix):
    rows, columns = 3, 5
    x = torch.randn(2, prefix + 15, 8)
    table = torch.zeros(prefix + 15, 8)
    for row in range(rows):
        for column in range(columns):
            at = prefix + row * columns + column
            for i in range(2):
                for offset, place in ((0, row), (4, column)):
                    table[at, offset + i] = math.sin(place / 10_000 ** (i / 2))
                    table[at, offset + 2 + i] = math.cos(place / 10_000 ** (i / 2))
    module = SinusoidalPosition(8, max_length=prefix + 15, grid=(rows, columns))
    torch.testing.assert_close(module.embed(x, None), x + table, rtol=1e-5, atol=1e-5)


def test_odd_widths_are_the_users_mistake():
    with pytest.raises(UserError, match="multiple of 2; got 7"):
        SinusoidalPosition(7)
    with pytest.raises(UserError, match="on a grid need a width that is a multiple of 4; got 6"):
        SinusoidalPosition(6, grid=(2, 2))
