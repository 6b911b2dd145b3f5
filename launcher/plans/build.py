"""The real parallelised model on fake ranks: one rank's shards and one of its steps, measured.

PyTorch's fake process group stands for any number of ranks in one process, and fake tensors have
shapes but no memory; the model, its sharding and its messages are the ones that a run would use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.registry import build
from launcher.config import RunConfig
from launcher.plans.trace import Trace
from model.language import LanguageConfig
from model.output import Batch
from model.zoo import build_model
from parallel.gradients import local
from parallel.layout import Layout
from parallel.native import NativeEngine
from parallel.traffic import Message, group_axes


@dataclass
class Cost:
    """One rank's step.

    parameters, gradients, optimizer: bytes that it holds of each.
    peak: bytes of everything else that is alive at the step's worst moment: activations, gathered
        parameters, gradients on their way.
    flops, touched, messages: of the whole step.
    """

    rank: int
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    peak: int = 0
    flops: float = 0.0
    touched: float = 0.0
    messages: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    """(axis, operation, ranks) → how many, their bytes, what this rank sends."""

    @property
    def memory(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.peak


class StepLoss:
    """A loss of the shapes that training has: cross-entropy and auxiliary losses, all counted."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(batch)
        sums = {"loss": output.token_losses.sum(), **self.counts(batch)}
        if output.losses:
            sums["auxiliary"] = sum(value.sum() for value in output.losses.values())
        return sums

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        first = next(iter(batch.values()))
        size = torch.tensor(float(len(first)))
        return {"count": size * batch["targets"][0].numel(), "samples": size}


@contextmanager
def fake_ranks(world: int, rank: int) -> Iterator[None]:
    """Inside, this process is one of `world` ranks whose messages go nowhere."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def empty_batch(config: RunConfig, size: int) -> Batch:
    """A micro-batch of the run's shapes: one document a sample."""
    model = config.model
    if isinstance(model, LanguageConfig):
        assert isinstance(model.max_length, int)
        tokens = torch.zeros(size, model.max_length, dtype=torch.int64)
        batch = {"tokens": tokens, "targets": tokens.clone()}
        if model.architecture == "encoder_decoder":
            batch["source"] = tokens.clone()
        return batch
    side: Any = model.image_size
    rows, columns = (side, side) if isinstance(side, int) else side
    assert isinstance(model.channels, int)
    images = torch.zeros(size, model.channels, rows, columns)
    return {"images": images, "targets": torch.zeros(size, dtype=torch.int64)}


def state_bytes(engine: NativeEngine, optimizer: Any) -> tuple[int, int, int]:
    """Bytes that this rank holds of parameters, gradients and optimizer state."""
    parameters = list(engine.model.parameters())
    tensors = [t for held in optimizer.tensors().values() for t in held.values()]
    trained = (p for p in parameters if p.requires_grad)
    return _bytes(parameters), _bytes(trained), _bytes(tensors)


def _bytes(tensors: Any) -> int:
    return sum(local(t).numel() * local(t).element_size() for t in tensors)


def measure(config: RunConfig, layout: Layout, micro_batch: int, micro_batches: int) -> Cost:
    """Build `layout.rank` of the run and take one step of it.

    A step of many micro-batches is extrapolated from two short ones, since from some number on
    every further micro-batch costs the same and memory no longer grows.

    Raises:
        UserError: if the model cannot run under the layout.
    """
    with fake_ranks(layout.world, layout.rank):
        with torch.device("meta"):
            model = build_model(config.model)
        engine = NativeEngine(layout, torch.device("cpu"), config.parallel)
        train = config.train
        engine.place(model, precision=train.precision, recompute=train.recompute, compile=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            engine.materialise()
            optimizer = build("optimizer", train.optimizer, model=engine.model)
            cost = Cost(layout.rank, *state_bytes(engine, optimizer))
            step = layout.pp * (config.parallel.virtual_stages if layout.pp > 1 else 1)
            short = min(step, micro_batches)
            first = _trace(engine, config, micro_batch, short)
            further = min(2 * short, micro_batches)
            second = first if further == short else _trace(engine, config, micro_batch, further)
    times = 0.0 if further == short else (micro_batches - short) / (further - short)
    cost.peak = max(first.peak, second.peak) - cost.gradients
    cost.flops = first.flops + times * (second.flops - first.flops)
    cost.touched = first.touched + times * (second.touched - first.touched)
    early, late = _summed(first.messages), _summed(second.messages)
    for key in late:
        some = early.get(key, [0.0, 0.0, 0.0])
        cost.messages[key] = [a + times * (b - a) for a, b in zip(some, late[key], strict=True)]
    return cost


def _trace(engine: NativeEngine, config: RunConfig, micro_batch: int, micro_batches: int) -> Trace:
    batches = [empty_batch(config, micro_batch) for _ in range(micro_batches)]
    engine.model.train()
    assert engine.mesh is not None or engine.layout.world == 1
    axes = group_axes(engine.mesh, engine.layout) if engine.mesh is not None else {}
    with Trace(axes) as trace:
        engine.forward_backward(batches, StepLoss())
        engine.clip_gradients(config.train.clip)
    for parameter in engine.model.parameters():
        parameter.grad = None
    return trace


def _summed(messages: list[Message]) -> dict[tuple[str, str, int], list[float]]:
    found: dict[tuple[str, str, int], list[float]] = {}
    for message in messages:
        held = found.setdefault((message.axis, message.operation, message.size), [0.0, 0.0, 0.0])
        for index, value in enumerate((1.0, message.bytes, message.sent)):
            held[index] += value
    return found
