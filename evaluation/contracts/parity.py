"""One model, run on one process and under a layout: how far apart are they?

`compare` builds the model from its config on both sides, from the same seed, and gives the largest
relative errors of outputs, of every gradient and of the global gradient norm. The one process runs
the plain model with plain autograd, without any engine.

Errors are scaled by the largest entry: of the output; of that parameter's gradient, but at least
`FLOOR` of the largest gradient entry of the model (a key's bias, for one, has a gradient of zero by
the mathematics of softmax, and what is left of it is rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from evaluation.contracts.probe import stir
from evaluation.contracts.ranks import Ranks
from model.init import initialise
from model.output import Batch
from model.zoo import build_model
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.native import NativeEngine
from training.optimizers.adamw import AdamW

FLOOR = 1e-2
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2+sp": {"tp": 2, "sequence_parallel": True},
    "fsdp2": {"fsdp": 2},
    "replicate2": {"replicate": 2, "fsdp": 1},
}
LARGE_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2×fsdp2": {"tp": 2, "fsdp": 2},
    "tp2+sp×fsdp2": {"tp": 2, "fsdp": 2, "sequence_parallel": True},
    "hsdp2×2": {"replicate": 2, "fsdp": 2},
    "tp2×replicate2": {"tp": 2, "replicate": 2, "fsdp": 1},
}


@dataclass
class Measured:
    """What a model gave: token losses of the whole batch, gradients by name, their norm."""

    output: Tensor
    gradients: dict[str, Tensor]
    norm: Tensor
    losses: list[float] = field(default_factory=list)


@dataclass
class Errors:
    """Largest relative errors; `gradients` by parameter."""

    output: float
    gradients: dict[str, float]
    norm: float
    loss: float = 0.0
    """Of the losses before and behind each optimizer step."""

    @property
    def gradient(self) -> float:
        return max(self.gradients.values())

    @property
    def worst(self) -> float:
        return max(self.output, self.gradient, self.norm, self.loss)

    def __str__(self) -> str:
        name = max(self.gradients, key=lambda key: self.gradients[key])
        return (
            f"output {self.output:.1e}, gradient {self.gradient:.1e} ({name}), "
            f"norm {self.norm:.1e}, losses {self.loss:.1e}"
        )


class Loss:
    """A loss function as training has them: cross-entropy and the model's auxiliary losses."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(batch)
        self.outputs.append(output.token_losses.detach())
        sums = {"loss": output.token_losses.sum(), **self.counts(batch)}
        if output.losses:
            sums["auxiliary"] = sum(value.sum() for value in output.losses.values())
        return sums

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        if "targets" in batch:
            count = (batch["targets"] != -100).sum()
        else:  # masked images: one loss an image
            count = torch.tensor(len(batch["mask"]))
        first = next(iter(batch.values()))
        return {"count": count.float(), "samples": torch.tensor(float(len(first)))}


def on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return build_model(config)


def filled(config: Any, seed: int, stirred: bool) -> nn.Module:
    """The plain model; `stirred`: moved off its first values, so that every path counts."""
    model = build_model(config)
    initialise(model, seed)
    if stirred:
        stir(model, seed)
    return model


def single(
    config: Any,
    batch: Batch,
    *,
    seed: int = 0,
    stirred: bool = False,
    micro_batches: int = 1,
    data_size: int = 1,
    steps: int = 0,
) -> Measured:
    """The plain model on one process, and its losses over so many optimizer steps.

    Micro-batches are those of `data_size` ranks, whose shares they cut: what is counted over a
    micro-batch, as the experts' load is, depends on it.
    """
    model = filled(config, seed, stirred)
    model.train()
    loss = Loss()
    counts = loss.counts(batch)

    def backward() -> float:
        total = 0.0
        for part in _micro_batches(batch, micro_batches, data_size):
            sums = loss(model, part)
            root = sums["loss"] / counts["count"]
            if "auxiliary" in sums:
                root = root + sums["auxiliary"] / counts["samples"]
            root.backward()
            total += float(root.detach())
        return total

    losses = [backward()]
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    shares = [output.chunk(data_size) for output in loss.outputs]
    output = torch.cat([part[rank] for rank in range(data_size) for part in shares])
    measured = Measured(output, {n: g.clone() for n, g in gradients.items()}, norm.float(), losses)
    if steps:
        losses += _steps(model, steps, backward)
    return measured


def _steps(model: nn.Module, steps: int, backward: Callable[[], float]) -> Iterator[float]:
    """The loss behind each of so many optimizer steps; gradients of the first are there."""
    # What is zero but for rounding is below this epsilon, and moves nothing.
    optimizer = AdamW(model, lr=1e-3, eps=1e-4)
    for _ in range(steps):
        optimizer.step(1.0)
        optimizer.zero_grad()
        yield backward()


def _micro_batches(batch: Batch, count: int, data_size: int) -> Iterator[Batch]:
    """The samples that all data ranks take at a time."""
    cut = {
        key: [share.chunk(count) for share in value.chunk(data_size)]
        for key, value in batch.items()
    }
    for index in range(count):
        yield {key: torch.cat([share[index] for share in cut[key]]) for key in cut}


def world() -> tuple[int, int]:
    """The number of processes and this one's rank."""
    if not dist.is_initialized():
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


def start(layout: dict[str, Any], config: Any, *, seed: int = 0, **prepare: Any) -> NativeEngine:
    """On a rank: an engine over the pool's world, the model prepared."""
    parallel = ParallelConfig(**layout)
    placed = Layout.of(parallel, *world())
    engine: NativeEngine = parallel.engine.build(
        layout=placed, device=torch.device("cpu"), config=parallel
    )
    engine.prepare(on_meta(config), seed=seed, **prepare)
    engine.model.train()
    return engine


def share(engine: NativeEngine, batch: Batch, micro_batches: int = 1) -> list[Batch]:
    """On a rank: its samples of a global batch, as micro-batches."""
    own = {key: value.chunk(engine.data_size)[engine.data_rank] for key, value in batch.items()}
    parts = {key: value.chunk(micro_batches) for key, value in own.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(micro_batches)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def measure(
    layout: dict[str, Any],
    config: Any,
    batch: Batch,
    seed: int = 0,
    micro_batches: int = 1,
    prepare: dict[str, Any] | None = None,
    stirred: bool = False,
    steps: int = 0,
) -> tuple[Layout, Measured]:
    """On a rank: its place, and what the engine gave."""
    engine = start(layout, config, seed=seed, **(prepare or {}))
    if stirred:
        values = filled(config, seed, True).named_parameters()
        engine.load_model_state({name: value.detach() for name, value in values})
    loss = Loss()
    batches = share(engine, batch, micro_batches)

    def backward() -> float:
        sums = engine.forward_backward(batches, loss)
        total = engine.total(sums["loss"]) / engine.total(sums["count"])
        if "auxiliary" in sums:
            total = total + engine.total(sums["auxiliary"]) / engine.total(sums["samples"])
        return float(total)

    losses = [backward()]
    norm = engine.clip_gradients(None)
    gradients = {
        name: whole(parameter.grad).clone()
        for name, parameter in engine.model.named_parameters()
        if parameter.grad is not None
    }
    output = torch.cat(loss.outputs) if loss.outputs else torch.empty(0)
    if steps:
        losses += _steps(engine.model, steps, backward)
    return engine.layout, Measured(output, gradients, norm, losses)


def errors(got: Measured, wanted: Measured) -> Errors:
    """How far apart two measurements are."""
    assert got.gradients.keys() == wanted.gradients.keys()
    floor = FLOOR * max(float(g.abs().max()) for g in wanted.gradients.values())
    gradients = {
        name: float((got.gradients[name] - value).abs().max())
        / max(float(value.abs().max()), floor)
        for name, value in wanted.gradients.items()
    }
    output = (got.output - wanted.output).abs().max() / wanted.output.abs().max()
    norm = (got.norm - wanted.norm).abs() / wanted.norm
    pairs = zip(got.losses, wanted.losses, strict=True) if got.losses else ()
    loss = max((abs(a - b) / abs(b) for a, b in pairs), default=0.0)
    return Errors(float(output), gradients, float(norm), loss)


def compare(
    ranks: Ranks | None,
    config: Any,
    batch: Batch,
    layouts: dict[str, dict[str, Any]],
    *,
    seed: int = 0,
    micro_batches: int = 1,
    prepare: dict[str, Any] | None = None,
    stirred: bool = False,
    steps: int = 0,
) -> dict[str, Errors]:
    """The errors of each layout, by its name, the worst of all its ranks.

    Args:
        config: a model config, or the mapping that makes one; no dropout.
        batch: a global batch; its first axis divides by the data ranks and micro-batches.
        layouts: `ParallelConfig` options by a name, such as `LAYOUTS`.
        prepare: further arguments of `Engine.prepare`.
        stirred: move every parameter off its first value.
        ranks: the pool; None runs the engine on this process alone.
        steps: also compare the losses over so many optimizer steps.
    """
    found: dict[str, Errors] = {}
    references: dict[int, Measured] = {}
    size = ranks.size if ranks is not None else 1
    for name, layout in layouts.items():
        data = Layout.of(ParallelConfig(**layout), size).data_size if micro_batches > 1 else 1
        if data not in references:
            references[data] = single(
                config,
                batch,
                seed=seed,
                stirred=stirred,
                micro_batches=micro_batches,
                data_size=data,
                steps=steps,
            )
        wanted = references[data]
        asked = (layout, config, batch, seed, micro_batches, prepare, stirred, steps)
        answers = ranks.run(measure, *asked) if ranks is not None else [measure(*asked)]
        worst = [errors(each, wanted) for each in _models(answers)]
        found[name] = max(worst, key=lambda each: each.worst)
    return found


def _models(answers: list[tuple[Layout, Measured]]) -> Iterator[Measured]:
    """What ranks that hold one whole model between them gave, put together.

    Along the data axes they give their samples' outputs, along the pipeline their stages'
    gradients; along the others everything is alike, and each is looked at.
    """
    places: dict[tuple[int, int], list[tuple[Layout, Measured]]] = {}
    for layout, measured in answers:
        at = layout.coordinates
        places.setdefault((at["cp"], at["tp"]), []).append((layout, measured))
    for held in places.values():
        held.sort(key=lambda pair: pair[0].data_rank)
        output = torch.cat([measured.output for _, measured in held])
        stages: dict[int, list[Measured]] = {}
        for layout, measured in held:
            stages.setdefault(layout.data_rank, []).append(measured)
        for parts in stages.values():
            gradients: dict[str, Tensor] = {}
            for part in parts:
                for name, value in part.gradients.items():
                    assert name not in gradients or gradients[name].equal(value), name
                    gradients[name] = value
            for part in parts:
                yield Measured(output, gradients, part.norm, part.losses)
