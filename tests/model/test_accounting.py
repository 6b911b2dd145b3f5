"""Counts against PyTorch's own counter, published figures and hand arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.accounting import count
from model.zoo import build_model, create_model

MIXER = {"name": "attention", "heads": 4, "kv_heads": 2, "backend": "reference"}


def language(**changes):
    block = {"mixer": MIXER, "feedforward": {"name": "swiglu", "ratio": 2}}
    block |= changes.pop("block", {})
    return build_model(
        {
            "kind": "language", "dim": 16, "depth": 2, "vocab": 40, "max_length": 24,
            "block": block, **changes,
        }
    )  # fmt: skip


def language_batch(targets=True, **more):
    tokens = torch.randint(0, 40, (3, 19))
    return {"tokens": tokens, **({"targets": tokens} if targets else {}), **more}


CASES = {
    "decoder": (language, {}, {}),
    "untied, tables": (language, {"tie_embeddings": False, "block": {"position": "learned"}}, {}),
    "biased scores, biases, window": (
        language,
        {"block": {"position": "alibi", "mixer": {**MIXER, "bias": True, "window": 5}}},
        {},
    ),
    "encoder-decoder": (
        language,
        {
            "architecture": "encoder_decoder",
            "block": {
                "mixer": MIXER,
                "cross": {"name": "cross_attention", "heads": 2, "backend": "reference"},
            },
        },
        {"source": torch.zeros(3, 7, dtype=torch.long)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_pytorch_counts(case):
    make, changes, more = CASES[case]
    model, batch = make(**changes), language_batch(**more)
    counted = count(model, batch)
    with FlopCounterMode(display=False) as meter:
        loss = model(batch).token_losses.mean()
        forward = meter.get_total_flops()
        loss.backward()
    assert counted.forward_flops == forward
    assert counted.training_flops == meter.get_total_flops()
    assert sum(counted.flops_by_part.values()) == counted.forward_flops


def test_logits_cost_what_losses_cost():
    model = language()
    with_targets, without = (count(model, language_batch(t)).forward_flops for t in (True, False))
    assert with_targets == without


def test_experts_by_hand():
    model = language(
        block={"feedforward": {"name": "moe", "experts": 8, "top_k": 2, "width": 10, "shared": 1}}
    )
    found = count(model, language_batch())
    expert, router = 3 * 16 * 10, 16 * 8
    assert found.by_part["moe"] == 2 * (9 * expert + router)
    assert found.active_by_part["moe"] == 2 * (3 * expert + router)
    assert found.parameters - found.active_parameters == 2 * 6 * expert
    assert found.flops_by_part["moe"] == 2 * (3 * 19) * found.active_by_part["moe"]
    assert found.by_kind["expert"] == 2 * 8 * expert
    assert found.by_part["mixer"] == 2 * (2 * 16 * 16 + 2 * 16 * 8)
    assert found.by_part["embedding"] == found.embedding_parameters == 40 * 16
    assert found.by_part["other"] == found.by_kind["norm"] == 5 * 16
    assert found.by_part["dense"] == 0


def test_mixtral_has_its_published_active_parameters():
    """12.9 billion of 46.7 (Jiang et al. 2024, 2401.04088)."""
    with torch.device("meta"):
        model = create_model("mixtral_8x7b")
    found = count(model, {"tokens": torch.zeros(1, 8, dtype=torch.long, device="meta")})
    assert found.parameters == 46_702_792_704
    assert found.active_parameters == 12_879_925_248
    # Every active matrix is used once per token; the embedding table is only looked up.
    assert found.embedding_parameters == 2 * 32_000 * 4096
    matrices = found.active_parameters - 32_000 * 4096 - found.by_kind["norm"]
    scores = 4 * 8 * 8 * 4096 * 32
    assert found.forward_flops == 2 * 8 * matrices + scores


def test_without_a_batch_there_are_no_operations():
    found = count(language())
    assert found.forward_flops is found.backward_flops is found.training_flops is None
    assert "FLOPs" not in found.table()


def test_constants_are_no_parameters():
    plain, biased = (count(language(block={"position": p})).parameters for p in ("none", "alibi"))
    assert plain == biased


def test_counting_leaves_the_model_alone():
    model, batch = language(), language_batch()
    before = model(batch).token_losses
    count(model, batch)
    assert all(not p.is_meta for p in model.parameters())
    assert torch.equal(model(batch).token_losses, before)


def test_table():
    text = count(language(), language_batch()).table()
    assert [line.split()[0] for line in text.splitlines()] == [
        "part", "embedding", "mixer", "dense", "head", "other", "total",
    ]  # fmt: skip
    assert f"{count(language()).parameters:,}" in text
