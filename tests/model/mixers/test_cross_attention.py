"""Cross-attention against the formula, gradients of the memory too; encoder-decoder models."""

import math

import pytest
import torch

from core.errors import UserError
from evaluation.contracts.probe import stir
from model.init import initialise
from model.mixers.cross_attention import CrossAttention
from model.stream import Stream
from model.zoo import build_model
from tests.model.reference import agree

X, MEMORY = torch.randn(2, 63, 8), torch.randn(2, 17, 8)


def slow(p, x_BTD, memory_BSD, heads, kv_heads, seen_BTS=None):
    """One sample, head and query at a time; a query that sees nothing gets zeros."""
    width = p["q.weight"].shape[0] // heads
    rows = []
    for b in range(x_BTD.shape[0]):
        q = x_BTD[b] @ p["q.weight"].T
        k, v = (memory_BSD[b] @ p[f"{n}.weight"].T for n in "kv")
        columns = []
        for h in range(heads):
            g = h * kv_heads // heads
            qh, kh, vh = (t[:, i * width : (i + 1) * width] for t, i in ((q, h), (k, g), (v, g)))
            out = []
            for t in range(x_BTD.shape[1]):
                seen = slice(None) if seen_BTS is None else seen_BTS[b, t]
                weights = (kh[seen] @ qh[t] / math.sqrt(width)).softmax(0)
                out.append(weights @ vh[seen])
            columns.append(torch.stack(out))
        rows.append(torch.cat(columns, 1))
    return torch.stack(rows) @ p["out.weight"].T


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_cross_attention_is_its_formula(backend, kv_heads, packed):
    mixer = CrossAttention(8, heads=4, kv_heads=kv_heads, backend=backend)
    documents = memory_documents = seen = None
    if packed:
        documents = (torch.arange(63) // 25).expand(2, -1)  # 0, 1, 2; the memory has no 2
        memory_documents = (torch.arange(17) // 9).expand(2, -1)
        seen = documents[:, :, None] == memory_documents[:, None, :]
        assert not seen[:, -1].any()

    def ours(x, memory):
        stream = Stream(x, documents=documents, memory=memory, memory_documents=memory_documents)
        return mixer(x, stream)

    agree(mixer, lambda p, x, m: slow(p, x, m, 4, kv_heads, seen), X, MEMORY, call=ours)


def model(**changes):
    mixer = {"name": "attention", "heads": 2}
    built = build_model(
        {
            "kind": "language", "architecture": "encoder_decoder", "dim": 16, "depth": 2,
            "encoder_depth": 1, "vocab": 13, "max_length": 24,
            "block": {"mixer": mixer, "cross": {"name": "cross_attention", "heads": 2}}, **changes,
        }
    )  # fmt: skip
    initialise(built, 0)
    return built


def test_an_encoder_decoder_learns_to_reverse_its_source():
    """Targets depend on the source alone: only through the memory can the loss pass ln 12."""
    torch.manual_seed(0)
    lm = model()
    optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        source = torch.randint(1, 13, (32, 4))
        targets = source.flip(1)
        tokens = torch.cat((torch.zeros(32, 1, dtype=torch.long), targets[:, :-1]), 1)
        loss = lm({"tokens": tokens, "targets": targets, "source": source}).token_losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.3 and losses[-1] < 1.2, losses[::30]


def test_packed_sources_reach_their_own_documents_only():
    lm = model().eval()
    stir(lm, 0, 5.0)
    batch = {
        "tokens": torch.randint(0, 13, (1, 10)),
        "documents": torch.tensor([[0] * 6 + [1] * 4]),
        "source": torch.randint(0, 13, (1, 8)),
        "source_documents": torch.tensor([[0] * 3 + [1] * 5]),
    }
    changed = {**batch, "source": batch["source"].clone()}
    changed["source"][0, 5] = (changed["source"][0, 5] + 1) % 13
    with torch.no_grad():
        moved = (lm(batch).logits - lm(changed).logits).abs().amax(-1)[0]
    assert moved[:6].max() < 1e-6 < 1e-3 < moved[6:].min()


def test_every_source_token_reaches_every_output_and_receives_a_gradient():
    lm = model()
    stir(lm, 0, 3.0)
    batch = {"tokens": torch.randint(0, 13, (2, 5)), "source": torch.randint(0, 13, (2, 7))}
    hidden = []
    lm.encoder.norm.register_forward_hook(lambda *a: a[2].retain_grad() or hidden.append(a[2]))
    lm(batch).logits[:, 0].square().sum().backward()
    assert (hidden[0].grad.abs().sum(-1) > 0).all()


def test_without_a_memory_the_message_says_what_to_do():
    with pytest.raises(UserError, match="architecture: encoder_decoder"):
        CrossAttention(8)(X, Stream(X))
    with pytest.raises(UserError, match=r"model\.block\.cross: an encoder_decoder needs it"):
        model(block={"mixer": {"name": "attention", "heads": 2}})
    with pytest.raises(UserError, match="needs 'source' tokens"):
        model()({"tokens": torch.zeros(1, 3, dtype=torch.long)})
