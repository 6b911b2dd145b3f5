"""Decoding from the cache gives the logits of the whole sequence computed at once."""

import pytest
import torch

from core.registry import entries
from evaluation.contracts.probe import probe, stir
from model.cache import Cache
from model.init import initialise
from model.zoo import build_model

CACHING = [entry for entry in entries("mixer") if getattr(entry.target, "caches", False)]
LENGTH = 17


def tiny(**block):
    mixer = {"name": "attention", "heads": 4, "kv_heads": 2, **block.pop("mixer", {})}
    config = {
        "kind": "language", "dim": 16, "depth": 3, "vocab": 31, "max_length": LENGTH,
        "block": {"mixer": mixer, "feedforward": {"name": "swiglu", "ratio": 2}, **block},
    }  # fmt: skip
    return prepared(config)


def prepared(config):
    model = build_model(config)
    initialise(model, 0)
    stir(model, 0, 4.0)
    return model.eval()


def assert_decodes_alike(model, pieces, vocab=31, extra=None):
    """Feed the tokens in these pieces; after each, the last logits are those of the whole."""
    ids = torch.randint(0, vocab, (2, sum(pieces)), generator=torch.Generator().manual_seed(1))
    extra = extra or {}
    cache = Cache(sum(pieces))
    with torch.no_grad():
        whole = model({"tokens": ids, **extra}).logits
        for piece in pieces:
            start = cache.length
            out = model({"tokens": ids[:, start : start + piece], **extra}, cache)
            assert cache.length == start + piece
            torch.testing.assert_close(
                out.logits[:, 0], whole[:, cache.length - 1], rtol=1e-4, atol=1e-4
            )
    assert (whole[:, 1:] - whole[:, :-1]).abs().max() > 0.1, "the test could not tell them apart"


@pytest.mark.parametrize("entry", CACHING, ids=lambda entry: entry.name)
def test_every_mixer_that_says_so(entry):
    config = probe(entry).config
    model = prepared(config)
    extra = {}
    if config["architecture"] == "encoder_decoder":
        extra["source"] = torch.randint(0, config["vocab"], (2, 9))
    assert_decodes_alike(model, [5, 1, 1, 3, 1], config["vocab"], extra)


@pytest.mark.parametrize(
    "position", ["none", "rope", "alibi", "relative_bias", "learned", "sinusoidal"]
)
def test_positions(position):
    assert_decodes_alike(tiny(position=position), [4] + [1] * 13)


@pytest.mark.parametrize("window", [1, 3, 40])
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_windows(window, position, backend):
    model = tiny(position=position, mixer={"window": window, "backend": backend})
    assert_decodes_alike(model, [2, 1, 6, 1, 1, 4, 1, 1])


def test_softcap_qk_norm_ladder_and_experts():
    model = tiny(
        mixer={"softcap": 3.0, "qk_norm": "rmsnorm", "kv_heads": 1},
        residual="ladder",
        feedforward={"name": "moe", "experts": 4, "ratio": 1},
    )
    assert_decodes_alike(model, [9] + [1] * 8)


def test_layers_and_branches_of_a_mixed_pattern_keep_apart():
    """Blocks of one and of two mixers: entries are named by layer and branch."""
    mixer = {"name": "attention", "heads": 2}
    blocks = [{"mixer": mixer}, {"mixer": mixer, "cross": mixer}]
    model = prepared(
        {"kind": "language", "dim": 16, "depth": 4, "vocab": 31, "max_length": 17, "block": blocks}
    )
    assert_decodes_alike(model, [3] + [1] * 5)


def test_a_window_returns_only_what_is_seen():
    cache = Cache(10)
    k = torch.arange(6.0).view(1, 1, 6, 1)
    for at in range(6):
        keys, values = cache.extend("0.mixer", k[:, :, at : at + 1], -k[:, :, at : at + 1], 3)
        assert keys.flatten().tolist() == list(map(float, range(max(0, at - 2), at + 1)))
        assert torch.equal(values, -keys)
        cache.advance(1)
