"""Learned positions: a row of the table per position."""

import pytest
import torch

from core.errors import UserError
from model.positions.learned import LearnedPosition


def test_adds_the_row_of_each_position():
    position = LearnedPosition(6, 10)
    x = torch.randn(2, 4, 6)
    at = torch.tensor([[0, 1, 2, 3], [5, 6, 0, 9]])
    table = dict(position.named_parameters())["table.weight"]
    torch.testing.assert_close(position.embed(x, at)[1, 3], x[1, 3] + table[9])
    torch.testing.assert_close(position.embed(x, None)[1, 3], x[1, 3] + table[3])


def test_longer_than_the_table_is_the_users_mistake():
    with pytest.raises(UserError, match="11 tokens, but the learned positions end at 10"):
        LearnedPosition(6, 10).embed(torch.zeros(1, 11, 6), None)
