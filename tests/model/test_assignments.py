"""Rows grouped by expert and back, against plain indexing."""

import pytest
import torch

from model.assignments import group, slot

CHOSEN = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :3]
KEPT = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) < 0.6


def assignments(case):
    """The assignments and which of them count."""
    if case == "all":
        return group(CHOSEN, 5), torch.ones_like(KEPT)
    if case == "uneven":
        return group(CHOSEN, 5, KEPT), KEPT
    place = torch.zeros_like(CHOSEN)
    for e in range(5):
        mine = CHOSEN.eq(e)
        place[mine] = torch.arange(int(mine.sum()))
    return slot(CHOSEN, place, 5, 4), place < 4


@pytest.mark.parametrize("case", ["all", "uneven", "slots"])
def test_there_and_back(case):
    """Breaks if a row goes to another expert, comes back to another token, or is lost."""
    to, counts = assignments(case)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    factor_E = torch.arange(1.0, 6, dtype=torch.float64)
    rows = to.spread(x)
    expert_P = torch.arange(5).repeat_interleave(to.count)
    y = to.gather(rows * factor_E[expert_P, None], weights)
    wanted = torch.zeros_like(x)
    for n in range(9):
        for k in range(3):
            if counts[n, k]:
                wanted[n] += (x[n] * factor_E[CHOSEN[n, k]] * weights[n, k]).detach()
    torch.testing.assert_close(y, wanted)

    def through(x, weights):
        return to.gather(to.spread(x) * factor_E[expert_P, None], weights)

    assert torch.autograd.gradcheck(through, (x, weights))


def test_no_tokens():
    to = group(CHOSEN[:0], 5)
    x = torch.randn(0, 4, requires_grad=True)
    y = to.gather(to.spread(x), torch.randn(0, 3))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 4)
    assert to.count.tolist() == [0] * 5
