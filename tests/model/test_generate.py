"""Sampling: with and without a cache, the filters, the ends."""

import pytest
import torch

from core.errors import UserError
from evaluation.contracts.probe import stir
from model.generate import can_cache, generate, logits_at_last, sample
from model.init import initialise
from model.zoo import build_model


def model(**changes):
    config = {
        "kind": "language", "dim": 16, "depth": 2, "vocab": 11, "max_length": 12,
        "block": {"mixer": {"name": "attention", "heads": 2}}, **changes,
    }  # fmt: skip
    built = build_model(config)
    initialise(built, 0)
    stir(built, 0, 10.0)
    return built


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_greedy_is_the_argmax_of_the_whole_sequence():
    lm = model()
    assert can_cache(lm)
    ids = generate(lm, PROMPT, 8, temperature=0)
    assert lm.training and ids.shape == (2, 11)
    assert torch.equal(ids[:, :3], PROMPT)
    with torch.no_grad():
        whole = lm.eval()({"tokens": ids}).logits.argmax(-1)
    assert torch.equal(whole[:, 2:-1], ids[:, 3:])
    assert len(ids[:, 3:].unique()) > 2


def test_recomputing_draws_the_same_tokens():
    lm = model()
    draws = []
    for caches in (True, False):
        for block in lm.stack.blocks:
            block.sublayers["mixer"].branch.caches = caches
        assert can_cache(lm) is caches
        draws.append(generate(lm, PROMPT, 8, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(*draws)


def test_stops():
    lm = model()
    free = generate(lm, PROMPT, 8, temperature=0)
    end = free[0, 5].item()
    ids = generate(lm, PROMPT[:1], 8, temperature=0, stop=[end])
    first = free[0, 3:].tolist().index(end)
    assert torch.equal(ids[0], free[0, : 4 + first])
    both = generate(lm, PROMPT, 8, temperature=0, stop=[end])
    assert (both[0, 3 + first :] == end).all()


def test_sampling_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(40_000, 3)
    drawn = sample(logits, 0.5, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(share, (logits[0] / 0.5).softmax(0), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.61}, {1, 3}),
        ({"top_p": 0.95}, {0, 1, 3}),
        ({"top_p": 0.0}, {3}),
        ({"top_k": 50}, {0, 1, 2, 3}),
    ],
)
def test_filters(options, kept):
    logits = torch.tensor([0.1, 0.25, 0.05, 0.6]).log().expand(2_000, 4)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    assert set(drawn.tolist()) == kept


def test_longer_than_the_model_is_the_users_mistake():
    lm = model()
    assert generate(lm, PROMPT, 10).shape == (2, 13)
    with pytest.raises(UserError, match=r"max_length of 12; ask for at most 10"):
        generate(lm, PROMPT, 11)
    with pytest.raises(UserError, match="at least one token"):
        generate(lm, PROMPT[:, :0], 1)
    with pytest.raises(UserError, match="an encoder sees both sides"):
        generate(model(architecture="encoder"), PROMPT, 1)


def test_logits_at_last_are_the_whole_vocabularys():
    lm = model()
    torch.testing.assert_close(
        logits_at_last(lm, {"tokens": PROMPT}), lm({"tokens": PROMPT}).logits[:, 2]
    )
