"""Value residuals against their formula, layer by layer; SVFormer's one projection and cache."""

import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError
from model.cache import Cache
from model.init import initialise
from model.zoo import build_model
from tests.model.test_cache import assert_decodes_alike, prepared

IDS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))


def config(depth=3, **mixer):
    mixer = {"name": "resformer", "heads": 4, "kv_heads": 2, **mixer}
    return {
        "kind": "language", "dim": 16, "depth": depth, "vocab": 31, "max_length": 24,
        "block": {"mixer": mixer, "position": "none", "feedforward": {"name": "mlp", "ratio": 1}},
    }  # fmt: skip


def slow(model, ids, mix):
    """The whole model, one head at a time; `mix(layer, mixer, first, own)` gives V'."""
    x = model.embedding(ids)
    first = None
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    for layer, block in enumerate(model.stack.blocks):
        sub = block.sublayers["mixer"]
        h, mixer = sub.placement.norm(x), sub.branch
        own = F.linear(h, mixer.v.weight) if hasattr(mixer, "v") else None
        first = own if layer == 0 else first
        values = own if layer == 0 else mix(layer, mixer, first, own)
        outputs = []
        for head in range(4):
            group, width = head // 2, 4
            q = F.linear(h, mixer.q.weight)[..., head * width : (head + 1) * width]
            k = F.linear(h, mixer.k.weight)[..., group * width : (group + 1) * width]
            scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(~causal, -torch.inf)
            outputs.append(scores.softmax(-1) @ values[..., group * width : (group + 1) * width])
        x = x + F.linear(torch.cat(outputs, -1), mixer.out.weight)
        sub = block.sublayers["feedforward"]
        x = x + sub.branch(sub.placement.norm(x))
    return model.head(model.stack.norm(x))


@pytest.mark.parametrize(
    ("options", "mix"),
    [
        ({"form": "identity"}, lambda n, m, first, own: 0.5 * first + 0.5 * own),
        (
            {"form": "identity", "lambda1": 2.0, "lambda2": 0.25},
            lambda n, m, first, own: 2 * first + own / 4,
        ),
        ({}, lambda n, m, first, own: m.weights.weight[0] * first + m.weights.weight[1] * own),
        ({"form": "single"}, lambda n, m, first, own: first),
        (
            {"form": "identity", "blocks": [2]},
            lambda n, m, first, own: 0.5 * first + 0.5 * own if n == 2 else own,
        ),
    ],
)
def test_values_are_mixed_as_the_formula_says(options, mix):
    """Breaks if λ1 and λ2 change places, or if the mix of block 2 starts from block 1's values."""
    model = prepared(config(**options)).double()
    found = model({"tokens": IDS}).logits
    torch.testing.assert_close(found, slow(model, IDS, mix), rtol=1e-9, atol=1e-9)


def test_only_own_values_is_the_plain_transformer():
    """λ1 = 0, λ2 = 1 (the catalogue's check); breaks with any other pair."""
    ours = prepared(config(form="identity", lambda1=0.0, lambda2=1.0))
    plain = prepared(config(name="attention"))
    assert torch.equal(ours({"tokens": IDS}).logits, plain({"tokens": IDS}).logits)
    mixed = prepared(config(form="identity"))
    assert not torch.allclose(mixed({"tokens": IDS}).logits, plain({"tokens": IDS}).logits)


def test_learnable_weights_start_at_a_half():
    model = build_model(config())
    initialise(model, 0)
    held = [b.sublayers["mixer"].branch.weights for b in model.stack.blocks]
    assert held[0] is None
    assert all(w.weight.tolist() == [0.5, 0.5] for w in held[1:])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("options", [{"form": "single"}, {"form": "single", "blocks": [1]}, {}])
def test_decoding_from_the_cache(options, window):
    """Breaks if a later block's cache begins with the latest step's values only."""
    assert_decodes_alike(prepared(config(window=window, **options)), [5, 1, 1, 3, 1])


def test_single_value_form_has_one_projection_and_half_the_cache():
    """The catalogue's check: one W_V, and a cache of (L + 1) / 2L of the original."""
    sizes = {}
    for form in ("single", "identity"):
        model = prepared(config(depth=4, form=form))
        cache = Cache(9)
        with torch.no_grad():
            model({"tokens": IDS}, cache)
        sizes[form] = sum(b.numel() for pair in cache._buffers.values() for b in pair)
        if form == "single":
            names = [n for n, _ in model.named_parameters() if n.endswith("branch.v.weight")]
            assert names == ["stack.blocks.0.sublayers.mixer.branch.v.weight"]
    assert sizes["single"] / sizes["identity"] == (4 + 1) / (2 * 4)


def test_a_later_block_without_a_first_is_told():
    whole = config(depth=2)
    plain = {**whole["block"], "mixer": {"name": "attention", "heads": 4}}
    model = prepared({**whole, "block": [plain, whole["block"]]})
    with pytest.raises(UserError, match="first block"):
        model({"tokens": IDS})
