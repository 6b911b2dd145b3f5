"""Pattention against its formula; growth keeps the function."""

import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError
from evaluation.contracts.probe import stir
from model.feedforwards.tokenformer import TokenFormer, grown
from model.init import initialise
from model.zoo import build_model
from tests.model.reference import agree

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def formula(p, x):
    scores = x @ p["keys.weight"].T
    norm = scores.square().sum(-1, keepdim=True).sqrt()
    return F.gelu(scores * scores.shape[-1] ** 0.5 / norm) @ p["values.weight"].T


def test_pattention_is_its_formula():
    """Breaks if τ is n, or the norm is a mean, or runs over the tokens of the sequence."""
    agree(TokenFormer(6, width=7), formula, X)


def test_scale_of_the_keys_does_not_matter():
    """The catalogue's check; breaks without the norm."""
    module = TokenFormer(6, width=7)
    before = module(X)
    with torch.no_grad():
        module.keys.weight.mul_(3.7)
    torch.testing.assert_close(module(X), before)


def test_a_token_without_scores_gets_zeros():
    assert torch.equal(TokenFormer(6)(torch.zeros(1, 2, 6)), torch.zeros(1, 2, 6))


def model(width, tau_tokens=None):
    feedforward = {"name": "tokenformer", "width": width, "tau_tokens": tau_tokens}
    config = {
        "kind": "language", "dim": 16, "depth": 2, "vocab": 11, "max_length": 8,
        "block": {"mixer": {"name": "attention", "heads": 2}, "feedforward": feedforward},
    }  # fmt: skip
    made = build_model(config)
    initialise(made, width)
    stir(made, width)
    return made


def test_a_grown_model_computes_the_same():
    """Breaks if new keys are not zero, or if τ follows the number of tokens."""
    ids = torch.arange(8)[None]
    small, large = model(12), model(20, tau_tokens=12)
    large.load_state_dict(grown(small.state_dict(), large.state_dict()))
    torch.testing.assert_close(large({"tokens": ids}).logits, small({"tokens": ids}).logits)
    wrong = model(20)
    wrong.load_state_dict(large.state_dict())
    assert not torch.allclose(wrong({"tokens": ids}).logits, small({"tokens": ids}).logits)
    loss = large({"tokens": ids, "targets": ids}).token_losses.sum()
    loss.backward()
    new = large.stack.blocks[0].sublayers["feedforward"].branch.keys.weight.grad[12:]
    assert new.abs().max() > 0, "the new tokens could not be trained"


def test_growth_of_anything_else_is_refused():
    small, large = model(12), model(20)
    with pytest.raises(UserError, match="only its parameter tokens may grow"):
        grown(large.state_dict(), small.state_dict())
    with pytest.raises(UserError, match="one of the two"):
        grown(small.state_dict(), {})
