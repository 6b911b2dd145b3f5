"""Each contract fails on a mechanism that breaks it."""

import pytest
import torch
from torch import nn

from core.registry import _entries, _lookup, register
from evaluation.contracts.local import PROOFS
from evaluation.contracts.probe import probe
from model.leaves import ColumnLinear, NormVector, RowLinear
from model.mixers.base import Mixer


class Peeks(Mixer):
    """Means over all tokens: sees the future and other documents."""

    def __init__(self, dim: int):
        super().__init__()
        self.out = RowLinear(dim, dim)

    def forward(self, x_BTD, stream):
        return self.out(x_BTD.mean(1, keepdim=True).expand_as(x_BTD))


class Idle(nn.Module):
    """Owns a gain that it never uses."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = NormVector(dim)

    def forward(self, x_BTD):
        return x_BTD


class Detached(nn.Module):
    """Cuts the gradient of its input."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = NormVector(dim)

    def forward(self, x_BTD):
        return x_BTD.detach() * self.gain()


class Stray(nn.Module):
    """Owns a parameter outside any leaf."""

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD):
        return x_BTD * self.gain


class Chance(nn.Module):
    """Not repeatable."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x_BTD):
        return x_BTD + 0.01 * torch.randn(())


class Hidden(nn.Module):
    """Does a matrix product that no leaf counts."""

    def __init__(self, dim: int):
        super().__init__()
        self.up = ColumnLinear(dim, dim)
        self.down = RowLinear(dim, dim)

    def forward(self, x_BTD, stream=None):
        return self.down(self.up(x_BTD)) @ torch.eye(x_BTD.shape[-1])


class Blows(nn.Module):
    """Overflows."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x_BTD):
        return x_BTD / 0.0


@pytest.mark.parametrize(
    ("slot", "target", "contract"),
    [
        ("mixer", Peeks, "causal"),
        ("mixer", Peeks, "documents"),
        ("norm", Idle, "gradients"),
        ("norm", Detached, "difference"),
        ("norm", Chance, "repeatable"),
        ("norm", Blows, "shapes"),
        ("norm", Blows, "gradients"),
        ("feedforward", Hidden, "counts"),
    ],
)
def test_contract_catches(slot, target, contract):
    name = f"broken_{target.__name__.lower()}"
    register(slot, name)(target)
    try:
        with pytest.raises(AssertionError):
            PROOFS[contract](probe(_entries[slot][name]))
    finally:
        del _entries[slot][name], _lookup[slot][name]


def test_a_parameter_outside_a_leaf_is_an_error():
    register("norm", "broken_stray")(Stray)
    try:
        with pytest.raises((TypeError, KeyError), match=r"gain"):
            probe(_entries["norm"]["broken_stray"]).model()
    finally:
        del _entries["norm"]["broken_stray"], _lookup["norm"]["broken_stray"]
