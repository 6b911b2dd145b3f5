"""GroupNorm against its formula and PyTorch's, and its statistics over shares of the tokens."""

import pytest
import torch

from core.errors import UserError
from model.norms.groupnorm import GroupNorm
from model.operations import Operations
from tests.model.reference import agree

X = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0)) + 2


@pytest.mark.parametrize("groups", [1, 3])
def test_groupnorm_is_its_formula(groups):
    def formula(p, x):
        out = []
        for part in x.chunk(groups, -1):
            mean = part.mean((1, 2), keepdim=True)
            variance = (part - mean).square().mean((1, 2), keepdim=True)
            out.append((part - mean) / (variance + 1e-3).sqrt())
        return torch.cat(out, -1) * p["gain.weight"] + p["bias.weight"]

    agree(GroupNorm(12, groups=groups, eps=1e-3), formula, X)


@pytest.mark.parametrize("groups", [1, 4])
def test_groupnorm_is_pytorchs(groups):
    torch_norm = torch.nn.GroupNorm(groups, 12)
    theirs = torch_norm(X.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(GroupNorm(12, groups=groups)(X), theirs)


def test_statistics_are_summed_over_the_ranks_outside_the_region_only():
    class Doubled(Operations):
        """Two ranks with the same tokens."""

        def sequence_sum(self, x):
            return 2 * x

    norm, lone = GroupNorm(12), GroupNorm(12)
    norm.axis.ops = Doubled()
    # Count, sum and squares all double: nothing changes, unless one of them was forgotten.
    torch.testing.assert_close(norm(X), lone(X))

    class Silent(Operations):
        """A rank that must not be asked."""

        def sequence_sum(self, x):
            raise AssertionError("a sum over ranks inside the region, where all tokens are")

    norm.axis.ops, norm.axis.inside = Silent(), True
    torch.testing.assert_close(norm(X), lone(X))


def test_groups_divide_the_width():
    with pytest.raises(UserError, match=r"dim \(12\) must be a multiple of groups \(5\)"):
        GroupNorm(12, groups=5)
