"""What a branch says it needs of other ranks' tokens; on one rank nothing is divided."""

from __future__ import annotations

import torch

from core.registry import resolve
from model.context import LOCAL_CONTEXT, need, told
from model.mixers.base import Mixer


class Convolving(Mixer):
    """A mixer that says nothing."""


def test_what_says_nothing() -> None:
    assert need("mixer", Convolving) == need("mixer", Convolving()) == "gather"
    assert need("feedforward", torch.nn.Identity()) == "tokens"


def test_in_words() -> None:
    def target(slot: str, name: str) -> object:
        return resolve(slot, name).entry.target

    assert told("mixer", target("mixer", "attention")).startswith("exchanges keys and values")
    assert told("mixer", Convolving).startswith("gathers all tokens")
    assert told("feedforward", target("feedforward", "mlp")).startswith("computes on each rank")
    assert told("feedforward", target("feedforward", "expert_choice")).startswith("gathers")
    assert told("feedforward", target("feedforward", "moe")).startswith("depends on its options: ")


def test_one_rank_holds_everything() -> None:
    x = torch.randn(2, 5, 3)
    for same in (LOCAL_CONTEXT.own, LOCAL_CONTEXT.whole, LOCAL_CONTEXT.alike):
        assert same(x) is x
    assert LOCAL_CONTEXT.positions(x, None) is None
