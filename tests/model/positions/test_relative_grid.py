"""The grid's relative position bias against its formula."""

import pytest
import torch

from core.errors import UserError
from model.positions.relative_grid import RelativeGridBias


def test_bias_is_read_by_distance_in_rows_and_columns():
    position = RelativeGridBias(2, (2, 3))
    table = position.table.weight
    at = torch.arange(6)[None]
    bias = position.bias(at, at)
    assert bias.shape == (1, 2, 6, 6)
    for t in range(6):
        for s in range(6):
            down, right = t // 3 - s // 3, t % 3 - s % 3
            assert torch.equal(bias[0, :, t, s], table[:, down + 1, right + 2])


def test_every_distance_is_used_and_none_twice():
    position = RelativeGridBias(1, (3, 4))
    with torch.no_grad():
        position.table.weight.copy_(torch.arange(35.0).view(1, 5, 7))
    at = torch.arange(12)[None]
    assert position.bias(at, at).unique().numel() == 35


def test_mistakes_are_told():
    with pytest.raises(UserError, match="image's grid only"):
        RelativeGridBias(2, None)
    with pytest.raises(UserError, match="class token"):
        RelativeGridBias(2, (2, 3), max_length=7)
