"""The scaling law of fine-grained mixtures against the figures recomputed from its constants."""

import math

import pytest

from core.errors import UserError
from model.scaling import LAWS, best_granularity, fine_grained_loss, training_flops


def size(billions):
    """Non-embedding parameters N = d²(8E + 4)·blocks of a 64× mixture, d = 64·blocks, from the
    active 12·d²·blocks of its dense base."""
    blocks = round((billions * 1e9 / (12 * 64**2)) ** (1 / 3))
    dim = 64 * blocks
    return dim, blocks, dim**2 * (8 * 64 + 4) * blocks


RECOMPUTED = [(0.1, 4.37e9, 8, 3.04), (1, 28.9e9, 16, 2.42), (7, 137.6e9, 32, 2.02),
              (1000, 7.9e12, 64, 1.33)]  # fmt: skip
"""Of 64 times so many billions of parameters, from the rounded constants."""


@pytest.mark.parametrize(("billions", "tokens", "granularity", "expected"), RECOMPUTED)
def test_the_law_gives_the_recomputed_losses(billions, tokens, granularity, expected):
    """Breaks if N counts active parameters only, or if γ and α change places."""
    active = billions * 1e9
    found = fine_grained_loss(64 * active, tokens, granularity)
    assert found == pytest.approx(expected, abs=0.005)
    assert fine_grained_loss(active, tokens, granularity) > expected + 0.25


def test_finer_is_better_at_equal_tokens_and_costs_router_operations_only():
    losses = [fine_grained_loss(1e9, 1e10, g) for g in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    coarse, fine = (training_flops(512, 8, 1.0, g, 64) for g in (1, 8))
    assert fine - coarse == 512 * 64 * 7 * 14 * 8


def test_the_best_granularity_grows_with_the_budget():
    dim, blocks, total = size(1)
    chosen = [best_granularity(total, dim, blocks, flops, 64) for flops in (1e19, 1e21, 1e24)]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]


def test_dense_has_no_granularity():
    dense = LAWS[1]
    assert dense.loss(1e9, 1e10, 1) == dense.loss(1e9, 1e10, 8)
    assert math.isclose(dense.loss(1e9, 1e10), 0.47 + 16.3 / 1e9**0.126 + 26.7 / 1e10**0.127)


def test_what_was_not_measured_is_refused():
    with pytest.raises(UserError, match="16 or 64"):
        fine_grained_loss(1e9, 1e10, expansion=32)
    with pytest.raises(UserError, match="at least 1"):
        fine_grained_loss(1e9, 1e10, 0.5)
