"""Sandwich norm against its formula."""

import torch

from tests.model.placements.plain import attention, final, mlp, norm, reference, scale, small


def test_sandwich_is_its_formula():
    """x + norm(f(norm(x))); breaks with either norm left out or the two exchanged."""

    def block(p, q, x):
        x = x + norm(p, "placement.after_norm")(attention(p, norm(p, "placement.norm")(x)))
        return x + norm(q, "placement.after_norm")(mlp(q, norm(q, "placement.norm")(x)))

    model = small("sandwich")
    torch.testing.assert_close(final(model), reference(model, block))


def test_what_a_branch_writes_has_no_scale_of_its_own():
    """Breaks without the norm behind the branch."""
    model = small("sandwich", norm={"name": "layernorm", "eps": 1e-12})
    before = final(model)
    scale(model, 7.0, "branch.out.weight")
    torch.testing.assert_close(final(model), before)


def test_it_goes_with_a_ladder():
    assert torch.isfinite(final(small("sandwich", residual="ladder"))).all()
