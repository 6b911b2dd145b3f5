"""Bytes of a step's messages on real ranks, against the least that each axis needs.

B batch of a rank, T tokens, D width, L blocks, V vocabulary, N = B·T, P parameters. What is smaller
than a token's vector a block (counts, sums, the gradient's norm) is allowed for.
"""

from __future__ import annotations

from typing import Any

from core.registry import get
from evaluation.contracts.parity import Loss, share, start
from evaluation.contracts.probe import probe
from evaluation.contracts.ranks import Ranks
from model.zoo import build_model
from parallel.traffic import Traffic, group_axes

B, T, D, L, V, HEADS, KV = 4, 32, 32, 2, 64, 4, 2
FLOAT = 4
STREAM = FLOAT * T * D  # of one sample
BLOCK = {
    "mixer": {"name": "attention", "heads": HEADS, "kv_heads": KV},
    "feedforward": {"name": "swiglu", "width": 64},
}
CONFIG: dict[str, Any] = {
    "kind": "language", "dim": D, "depth": L, "vocab": V, "max_length": T,
    "tie_embeddings": False, "block": BLOCK,
}  # fmt: skip
EXPERTS = {**BLOCK, "feedforward": {"name": "moe", "experts": 4, "top_k": 2, "width": 32}}


def traffic(
    config: dict[str, Any], layout: dict[str, Any], micro_batches: int = 1
) -> dict[str, dict[str, tuple[int, int]]]:
    """On a rank: axis → operation → how many messages, their bytes; of one step."""
    engine = start(layout, config)
    batch = probe(get("norm", "rmsnorm")).batch(size=B, length=T)
    batch = {name: batch[name] for name in ("tokens", "targets")}
    assert engine.mesh is not None
    for _ in range(2):  # the first step sets up
        with Traffic(group_axes(engine.mesh, engine.layout)) as seen:
            engine.forward_backward(share(engine, batch, micro_batches), Loss())
            engine.clip_gradients(None)
    return seen.by_axis()


def measured(
    pool: Ranks, layout: dict[str, Any], config: dict[str, Any] = CONFIG, **options: Any
) -> list[dict[str, dict[str, tuple[int, int]]]]:
    return pool.run(traffic, config, layout, **options)


def parameters(config: dict[str, Any] = CONFIG) -> int:
    return sum(p.numel() for p in build_model(config).parameters())


def test_tensor_parallel(ranks: Ranks) -> None:
    """Each sublayer, the embedding and the head: one sum of the stream forward, one backward."""
    for found in measured(ranks, {"tp": 2}):
        assert found.keys() == {"tp"}
        number, total = found["tp"]["all_reduce"]
        sums = (2 * L + 1) + (2 * L + 1)
        least = sums * B * STREAM
        loss = 3 * FLOAT * B * T  # maximum, sum of exponentials, the target's logit
        assert found["tp"].keys() == {"all_reduce"}
        assert least + loss <= total <= least + loss + 64
        assert number <= sums + 3


def test_sequence_parallel(ranks: Ranks) -> None:
    """A gather into each sublayer and a scatter out of it, and the same backward."""
    for found in measured(ranks, {"tp": 2, "sequence_parallel": True}):
        gathers = scatters = 2 * (2 * L + 1)
        assert found["tp"]["all_gather"] == (gathers, gathers * B * STREAM)
        assert found["tp"]["reduce_scatter"] == (scatters, scatters * B * STREAM)
        norms = FLOAT * D * (2 * L + 1)
        loss = 3 * FLOAT * B * T
        assert norms + loss <= found["tp"]["all_reduce"][1] <= norms + loss + 64


def test_sharded_data_parallel(ranks: Ranks) -> None:
    """Blocks are gathered twice, the rest once; every gradient is reduced once."""
    ends = 2 * V * D + D
    for found in measured(ranks, {"fsdp": 2}):
        whole = FLOAT * parameters()
        assert found["fsdp"]["all_gather"] == (2 * L + 1, 2 * whole - FLOAT * ends)
        assert found["fsdp"]["reduce_scatter"] == (L + 1, whole)


def test_accumulation_reduces_once(ranks: Ranks) -> None:
    for found in measured(ranks, {"fsdp": 2}, micro_batches=2):
        assert found["fsdp"]["reduce_scatter"] == (L + 1, FLOAT * parameters())


def test_data_parallel(ranks: Ranks) -> None:
    for found in measured(ranks, {"replicate": 2, "fsdp": 1}):
        total = found["replicate"]["all_reduce"][1]
        assert FLOAT * parameters() <= total <= FLOAT * parameters() + 64


def test_expert_parallel(ranks: Ranks) -> None:
    """Every assignment's vector out and back, forward and backward; experts are not reduced."""
    config = {**CONFIG, "block": EXPERTS}
    banks = L * 4 * 3 * D * 32
    for found in measured(ranks, {"ep": 2, "fsdp": 1}, config):
        rows = B // 2 * T * 2
        counts = 8 * 4  # int64, for each expert
        # What a rank sends out and gets back is told by routing; out and back are the same rows.
        number, total = found["ep"]["all_to_all"]
        assert number == 5 * L
        assert total <= L * (4 * 2 * rows * FLOAT * D + counts)
        assert total >= L * counts
        alike = FLOAT * (parameters(config) - banks)
        assert found["ep"]["reduce_scatter"][1] == alike


def test_context_parallel_ring(ranks: Ranks) -> None:
    """Keys and values go round forward; backward again, and their gradients behind them."""
    for found in measured(ranks, {"cp": 2, "fsdp": 1}):
        keys_values = 2 * FLOAT * B * T // 2 * KV * (D // HEADS)
        assert found["cp"]["all_to_all"] == (L * 3, L * 3 * keys_values)
        losses = FLOAT * B * T
        ends = 2 * V * D + D
        gathers = FLOAT * (2 * parameters() - ends) + losses
        assert found["cp"]["all_gather"][1] == gathers
        assert found["cp"]["reduce_scatter"][1] == FLOAT * parameters()


def test_pipeline(ranks: Ranks) -> None:
    """The stream crosses each border once forward, and its gradient once backward."""
    first, last = measured(ranks, {"pp": 2, "fsdp": 1}, micro_batches=2)
    assert first["pp"]["send"][1] == B * STREAM
    assert last["pp"]["send"][1] == B * STREAM
