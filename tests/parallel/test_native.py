"""The native engine beyond parity of one step: clipping, training, precision, state, compilation.

The functions named `…_on_a_rank` run on every rank of the pool.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from core.errors import UserError
from evaluation.contracts.parity import (
    LARGE_LAYOUTS,
    LAYOUTS,
    Loss,
    compare,
    on_meta,
    share,
    single,
    start,
    whole,
)
from evaluation.contracts.ranks import Ranks
from model.init import initialise
from model.zoo import build_model
from parallel.layout import Layout
from parallel.native import NativeEngine
from tests.parallel.test_parity import batch, config

STEPS = 5


def alone(**prepare: Any) -> NativeEngine:
    engine = NativeEngine(Layout(), torch.device("cpu"))
    engine.prepare(on_meta(config("llama")), seed=0, **prepare)
    return engine


def test_one_process_is_left_as_it_is() -> None:
    engine = alone()
    plain = build_model(config("llama"))
    initialise(plain, 0)
    assert type(engine.model) is type(plain)
    for name, parameter in plain.named_parameters():
        own = engine.model.get_parameter(name)
        assert type(own) is nn.Parameter and torch.equal(own, parameter)
    engine.forward_backward([batch()], Loss())
    wanted = single(config("llama"), batch())
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(engine.model.get_parameter(name).grad, gradient)


def test_accumulation_without_counts_beforehand() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return Loss()(model, batch)

    engine, wanted = alone(), single(config("llama"), batch())
    sums = engine.forward_backward(share(engine, batch(), 2), loss)
    assert sums["count"] == (batch()["targets"] != -100).sum()
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(engine.model.get_parameter(name).grad, gradient)
    engine.prepare(on_meta(config("experts")), seed=0)
    with pytest.raises(TypeError, match=r"needs counts\(batch\)"):
        engine.forward_backward(share(engine, batch(), 2), loss)


def test_a_model_with_values_is_refused() -> None:
    with pytest.raises(TypeError, match="meta"):
        NativeEngine(Layout(), torch.device("cpu")).prepare(build_model(config("llama")), seed=0)


def steps(engine: NativeEngine, clip: float | None = 0.5) -> list[tuple[float, float]]:
    """Loss and gradient norm of some steps of AdamW."""
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        sums = engine.forward_backward(share(engine, batch()), Loss())
        norm = engine.clip_gradients(clip)
        optimizer.step()
        totals = engine.total(torch.stack((sums["loss"].double(), sums["count"].double())))
        found.append((float(totals[0] / totals[1]), float(norm)))
    return found


def steps_on_a_rank(layout: dict[str, Any], prepare: dict[str, Any]) -> list[tuple[float, float]]:
    return steps(start(layout, config("llama"), **prepare))


def reference_steps() -> list[tuple[float, float]]:
    """The same with torch's own clipping and no engine."""
    model = build_model(config("llama"))
    initialise(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        sums = Loss()(model, batch())
        loss = sums["loss"] / sums["count"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training(ranks: Ranks, layout: str) -> None:
    wanted = reference_steps()
    assert wanted[0][1] > 0.5, "nothing would be clipped"
    for found in ranks.run(steps_on_a_rank, LAYOUTS[layout], {}):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_training_alone() -> None:
    torch.testing.assert_close(steps(alone()), reference_steps(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_training_on_four(four_ranks: Ranks, layout: str) -> None:
    for found in four_ranks.run(steps_on_a_rank, LARGE_LAYOUTS[layout], {}):
        torch.testing.assert_close(found, reference_steps(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16(ranks: Ranks, layout: str) -> None:
    """Compute is rounded to some three digits; parameters and gradients stay float32."""
    wanted = reference_steps()
    found = ranks.run(steps_on_a_rank, LAYOUTS[layout], {"precision": "bf16"})
    for got in found:
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
        assert got != wanted


def types_on_a_rank(layout: dict[str, Any]) -> set[torch.dtype]:
    engine = start(layout, config("llama"), precision="bf16")
    engine.forward_backward(share(engine, batch()), Loss())
    parameters = list(engine.model.parameters())
    return {p.dtype for p in parameters} | {p.grad.dtype for p in parameters if p.grad is not None}


def test_masters_are_float32(ranks: Ranks) -> None:
    for layout in LAYOUTS.values():
        assert ranks.run(types_on_a_rank, layout) == [{torch.float32}] * 2


def state_on_a_rank(layout: dict[str, Any]) -> tuple[bool, dict[str, Tensor]]:
    """Load whole tensors, then give them back through DTensors of the same layout."""
    engine = start(layout, config("llama"), seed=1)
    plain = build_model(config("llama"))
    initialise(plain, 2)
    engine.load_model_state({n: p.detach() for n, p in plain.named_parameters()})
    state = {name: value.clone() for name, value in engine.model_state().items()}
    engine.prepare(on_meta(config("llama")), seed=3)
    engine.load_model_state(state)
    got = {name: whole(value) for name, value in engine.model_state().items()}
    return all(torch.equal(got[n], p) for n, p in plain.named_parameters()), got


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state(ranks: Ranks, layout: str) -> None:
    for right, _ in ranks.run(state_on_a_rank, LAYOUTS[layout]):
        assert right


def test_state_of_another_model() -> None:
    engine = alone()
    state = engine.model_state()
    with pytest.raises(UserError, match=r"'head\.bias' is not in the model"):
        engine.load_model_state({**state, "head.bias": torch.ones(1)})
    state["embedding.weight"] = torch.ones(3, 3)
    with pytest.raises(UserError, match=r"'embedding.weight' has shape \(3, 3\)"):
        engine.load_model_state(state)


def first_values_on_a_rank(layout: dict[str, Any]) -> bool:
    """Rows that do not divide: 6 over tp 2 × fsdp 2 gives rows of 2 and 1."""
    changed = {**config("llama"), "depth": 1, "vocab": 6}
    changed["block"] = {**changed["block"], "feedforward": {"name": "swiglu", "width": 10}}
    engine = start(layout, changed)
    plain = build_model(changed)
    initialise(plain, 0)
    return all(
        torch.equal(whole(engine.model.get_parameter(name)), parameter)
        for name, parameter in plain.named_parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_first_values_of_uneven_shards(four_ranks: Ranks, layout: str) -> None:
    assert four_ranks.run(first_values_on_a_rank, LARGE_LAYOUTS[layout]) == [True] * 4


def memory_on_a_rank(recompute: str) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    engine = start({"fsdp": 2}, config("llama"), recompute=recompute)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Loss()(engine.model, share(engine, batch())[0])
    return sum(kept.values())


def test_recomputation_keeps_less(ranks: Ranks) -> None:
    none = ranks.run(memory_on_a_rank, "none")[0]
    assert ranks.run(memory_on_a_rank, "block")[0] < 0.5 * none


def unused_on_a_rank(layout: dict[str, Any]) -> list[str]:
    """Masked modelling leaves the class head out; the parameters without gradients."""
    engine = start(layout, VISION)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    masked = {"images": images, "mask": torch.arange(16).reshape(1, -1).expand(4, -1) % 2 == 0}
    for _ in range(3):
        engine.forward_backward(share(engine, masked), Loss())
    return [name for name, p in engine.model.named_parameters() if p.grad is None]


VISION: dict[str, Any] = {
    "kind": "vision", "image_size": 8, "channels": 1, "classes": 10, "dim": 16, "depth": 2,
    "stem": {"name": "patch", "patch": 2}, "reconstruct": "pixels",
    "block": {
        "norm": "layernorm", "position": "learned", "feedforward": "mlp",
        "mixer": {"name": "attention", "heads": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_that_the_loss_leaves_out(ranks: Ranks, layout: str) -> None:
    found = ranks.run(unused_on_a_rank, LAYOUTS[layout])
    assert found == [["head.linear.weight", "head.linear.bias"]] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vision(ranks: Ranks, layout: str) -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classified = {"images": images, "targets": torch.tensor([1, 2, 3, -100])}
    plain = {**VISION, "reconstruct": None}
    found = compare(ranks, plain, classified, {layout: LAYOUTS[layout]})[layout]
    assert found.worst < 1e-5, found


def wrapping_on_a_rank(layout: dict[str, Any]) -> tuple[bool, bool]:
    engine = start(layout, config("llama"))
    engine.forward_backward(share(engine, batch()), Loss())
    ddp = isinstance(engine._runs, DistributedDataParallel)
    return ddp, isinstance(next(engine.model.parameters()), DTensor)


def test_what_wraps_the_model(ranks: Ranks) -> None:
    found = {name: ranks.run(wrapping_on_a_rank, layout)[0] for name, layout in LAYOUTS.items()}
    assert found == {
        "tp2": (False, True),
        "tp2+sp": (False, True),
        "fsdp2": (False, True),
        "replicate2": (True, False),
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled(ranks: Ranks, layout: str, recompute: str) -> None:
    prepare = {"compile": True, "recompute": recompute}
    for found in ranks.run(steps_on_a_rank, LAYOUTS[layout], prepare, timeout=280):
        torch.testing.assert_close(found, reference_steps(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"keep_gathered": True}, {"reduce_every_micro_batch": True}])
def test_fsdp_options(ranks: Ranks, options: dict[str, Any]) -> None:
    layouts = {"fsdp2": {"fsdp": 2, **options}}
    found = compare(ranks, config("llama"), batch(8), layouts, micro_batches=2)["fsdp2"]
    assert found.worst < 1e-5, found
