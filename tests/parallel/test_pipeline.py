"""Pipelines: every schedule and everything that a stream carries, as on one process.

The functions named `…_on_a_rank` run on every rank of the pool.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import UserError
from evaluation.contracts.parity import (
    Errors,
    Loss,
    compare,
    filled,
    share,
    start,
)
from evaluation.contracts.ranks import Ranks
from model.generate import generate
from model.output import Batch
from parallel.config import ParallelConfig
from parallel.schedules import SCHEDULES, check_halves
from tests.parallel.test_native import VISION
from tests.parallel.test_parity import GROUPED, TOLERANCE, batch, config

MOE = {"name": "moe", "experts": 4, "top_k": 2, "ratio": 1, "shared": 1}
RICH = {"residual": "ladder", "mixer": GROUPED, "feedforward": MOE}
LOSSY: dict[str, Any] = {**config("experts"), "depth": 5, "block": RICH}
"""Uneven, with a tied table, reductions pending and auxiliary losses."""


def proven(
    ranks: Ranks,
    model: dict[str, Any],
    schedule: str = "1f1b",
    samples: Batch | None = None,
    **layout: Any,
) -> Errors:
    """The errors of four micro-batches against one process, every parameter off its first value."""
    prepare = layout.pop("prepare", None)
    options = {"pp": 2, "schedule": schedule, **layout}
    return compare(
        ranks,
        model,
        samples or batch(8),
        {"pp": options},
        micro_batches=4,
        stirred=True,
        prepare=prepare,
    )["pp"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(ranks: Ranks, schedule: str) -> None:
    found = proven(ranks, LOSSY, schedule)
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_depths_that_do_not_divide(ranks: Ranks, schedule: str) -> None:
    found = proven(ranks, {**config("llama"), "depth": 3}, schedule)
    assert found.worst < TOLERANCE, found


CARRIED: dict[str, dict[str, Any]] = {
    "hyper_connections": {"residual": {"name": "hyper_connections", "streams": 2}},
    "denseformer": {"residual": "denseformer"},
    "muddformer": {"residual": "muddformer"},
    "resformer": {"mixer": {"name": "resformer", "heads": 4}},
}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("carried", CARRIED)
def test_what_streams_carry(ranks: Ranks, carried: str, schedule: str) -> None:
    block = {"mixer": GROUPED, "feedforward": {"name": "swiglu", "ratio": 2}, **CARRIED[carried]}
    model = {**config("llama"), "depth": 4, "block": block}
    found = proven(ranks, model, schedule)
    assert found.worst < TOLERANCE, found


def images(**more: Tensor) -> Batch:
    noise = torch.Generator().manual_seed(1)
    pictures = torch.randn(8, 1, 8, 8, generator=noise)
    return {"images": pictures, "targets": torch.arange(8) % 10, **more}


HIERARCHY: dict[str, Any] = {
    **{key: value for key, value in VISION.items() if key not in ("dim", "depth", "reconstruct")},
    "stages": [{"dim": 16, "depth": 1}, {"dim": 32, "depth": 2}, {"dim": 64, "depth": 1}],
}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_zero_bubble"])
def test_hierarchical_vision(ranks: Ranks, schedule: str) -> None:
    found = proven(ranks, HIERARCHY, schedule, images())
    assert found.worst < TOLERANCE, found


def test_masked_images(ranks: Ranks) -> None:
    """The first stage and the last need the batch's mask; the class head has no gradient."""
    mask = torch.arange(16).expand(8, -1) % 3 == 0
    found = proven(ranks, VISION, "1f1b", images(mask=mask))
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_encoder_decoder(ranks: Ranks, schedule: str) -> None:
    """One table is the source's, the targets' and the head's, on up to three stages."""
    model = {
        **config("llama"),
        "architecture": "encoder_decoder",
        "block": {**config("llama")["block"], "cross": "cross_attention", "position": "learned"},
    }
    samples = batch(8)
    samples["source"] = samples["tokens"].flip(1)
    samples["source_documents"] = torch.zeros_like(samples["tokens"])
    samples["documents"] = torch.zeros_like(samples["tokens"])
    found = proven(ranks, model, schedule, samples)
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize(
    ("schedule", "recompute"), [("1f1b", "block"), ("1f1b", "selective"), ("zbv", "block")]
)
def test_recomputed(ranks: Ranks, schedule: str, recompute: str) -> None:
    found = proven(ranks, LOSSY, schedule, prepare={"recompute": recompute})
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize("options", [{"recompute": "selective"}, {"compile": True}])
def test_what_halves_of_a_backward_pass_cannot_do(options: dict[str, Any]) -> None:
    asked = {"recompute": "none", "compile": False, **options}
    with pytest.raises(UserError, match="zbv runs the backward pass in two halves"):
        check_halves(ParallelConfig(pp=2, schedule="zbv"), **asked)
    check_halves(ParallelConfig(pp=2, schedule="interleaved_1f1b"), **asked)


PRODUCTS: dict[str, dict[str, Any]] = {
    "pp4": {"pp": 4},
    "pp2×tp2": {"tp": 2},
    "pp2×tp2+sp": {"tp": 2, "sequence_parallel": True},
    "pp2×fsdp2": {"fsdp": 2},
    "pp2×replicate2": {"replicate": 2, "fsdp": 1},
    "pp2×cp2": {"cp": 2},
    "pp2×ep2": {"ep": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products(four_ranks: Ranks, product: str, schedule: str) -> None:
    model = {**LOSSY, "depth": 7} if product == "pp4" else LOSSY
    samples = batch(16 if schedule == "dualpipev" else 8)
    if product == "pp4" and schedule == "dualpipev":
        options = {"pp": 4, "schedule": schedule}
        found = compare(four_ranks, model, samples, {"": options}, micro_batches=8)[""]
    else:
        found = proven(four_ranks, model, schedule, samples, **PRODUCTS[product])
    assert found.worst < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_fsdp_recomputed_and_kept(four_ranks: Ranks, schedule: str, recompute: str) -> None:
    """Twice in a row: nothing gathered in a step is left for the next."""
    found = four_ranks.run(twice_on_a_rank, schedule, recompute)
    assert all(worst < 1e-5 for worst in found), found


def twice_on_a_rank(schedule: str, recompute: str) -> float:
    """How far a second step's gradients are off, after the parameters were moved."""
    layout = {"pp": 2, "fsdp": 2, "schedule": schedule}
    engine = start(layout, LOSSY, recompute=recompute)
    engine.forward_backward(share(engine, batch(8), 4), Loss())
    engine.evaluate(batch(2), Loss())
    values = filled(LOSSY, 0, True)
    engine.load_model_state({name: value.detach() for name, value in values.named_parameters()})
    engine.forward_backward(share(engine, batch(8), 4), Loss())
    moved = {n: p.grad.full_tensor() for n, p in engine.model.named_parameters()}  # type: ignore[union-attr]
    engine = start(layout, LOSSY, recompute=recompute)
    engine.load_model_state({name: value.detach() for name, value in values.named_parameters()})
    engine.forward_backward(share(engine, batch(8), 4), Loss())
    fresh = {n: p.grad.full_tensor() for n, p in engine.model.named_parameters()}  # type: ignore[union-attr]
    return max(float((moved[n] - fresh[n]).abs().max()) for n in fresh)


def evaluated_on_a_rank(schedule: str, model: dict[str, Any], samples: Batch) -> dict[str, float]:
    engine = start({"pp": 2, "schedule": schedule}, model)
    values = filled(model, 0, True).named_parameters()
    engine.load_model_state({name: value.detach() for name, value in values})
    sums = engine.evaluate(samples, Loss())
    assert engine.model.training, "evaluation leaves the model as it was"
    return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_1f1b"])
def test_evaluation(ranks: Ranks, schedule: str) -> None:
    """The sums are one process's, on every rank."""
    model = filled(LOSSY, 0, True).eval()
    with torch.no_grad():
        wanted = {name: float(value) for name, value in Loss()(model, batch(3)).items()}
    for found in ranks.run(evaluated_on_a_rank, schedule, LOSSY, batch(3)):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert wanted["auxiliary"] > 0


def generated_on_a_rank(schedule: str, prompts: Tensor) -> Tensor:
    engine = start({"pp": 2, "schedule": schedule}, LOSSY)
    values = filled(LOSSY, 0, True).named_parameters()
    engine.load_model_state({name: value.detach() for name, value in values})
    return generate(engine.model, prompts, 6, temperature=0)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_generation(ranks: Ranks, schedule: str) -> None:
    prompts = batch(2)["tokens"][:, :4]
    wanted = generate(filled(LOSSY, 0, True), prompts, 6, temperature=0)
    for found in ranks.run(generated_on_a_rank, schedule, prompts):
        assert found.equal(wanted)
    assert len(set(wanted[0, 4:].tolist())) > 1


def metrics_on_a_rank() -> dict[str, float]:
    """What the loss sees of the metrics of all stages."""
    engine = start({"pp": 2}, LOSSY)

    class Watching(Loss):
        def __call__(self, model: Any, batch: Batch) -> dict[str, Tensor]:
            output = model(batch)
            return {
                "loss": output.token_losses.sum(),
                **{name: value.sum() for name, value in output.metrics.items()},
                **self.counts(batch),
            }

    sums = engine.forward_backward(share(engine, batch(8), 4), Watching())
    return {name: float(value) for name, value in sums.items()}


def test_metrics_of_all_stages_reach_the_loss(ranks: Ranks) -> None:
    found = ranks.run(metrics_on_a_rank)
    assert found[0] == found[1]
    assert all(found[0][f"moe/{layer}/entropy"] > 0 for layer in range(5))


def steps_on_a_rank(schedule: str, precision: str) -> tuple[list[float], bool]:
    """Losses of some steps of AdamW; whether the tied table stayed alike on its two ranks."""
    engine = start({"pp": 2, "schedule": schedule}, LOSSY, precision=precision)
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        sums = engine.forward_backward(share(engine, batch(8), 4), Loss())
        engine.clip_gradients(0.5)
        optimizer.step()
        losses.append(float(sums["loss"] / sums["count"]))
    table = engine.model.get_parameter("embedding.weight").detach()
    assert engine.pipeline is not None
    return losses, bool(engine.pipeline.from_last(table).equal(table))


def alone(precision: str) -> list[float]:
    engine = start({}, LOSSY, precision=precision)
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        sums = engine.forward_backward(share(engine, batch(8), 4), Loss())
        engine.clip_gradients(0.5)
        optimizer.step()
        losses.append(float(sums["loss"] / sums["count"]))
    return losses


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training(ranks: Ranks, precision: str, schedule: str) -> None:
    wanted = alone(precision)
    for losses, alike in ranks.run(steps_on_a_rank, schedule, precision):
        assert alike
        assert losses == pytest.approx(wanted, rel=1e-4 if precision == "fp32" else 2e-2)
    assert wanted[-1] < wanted[0]


def too_few_on_a_rank(schedule: str, micro_batches: int) -> None:
    engine = start({"pp": 2, "schedule": schedule}, config("llama"))
    engine.forward_backward(share(engine, batch(4), micro_batches), Loss())


def test_too_few_micro_batches(ranks: Ranks) -> None:
    with pytest.raises(UserError, match=r"1f1b on 2 pipeline ranks .* 1 micro-batch; it can of 2"):
        ranks.run(too_few_on_a_rank, "1f1b", 1)
    with pytest.raises(UserError, match=r"dualpipev .* 2 micro-batches; it can of 4"):
        ranks.run(too_few_on_a_rank, "dualpipev", 2)
