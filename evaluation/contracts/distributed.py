"""The proofs on several processes: the same model under a layout as on one process, in float32.

What is compared is the loss, every gradient and the global gradient norm of one step, and the
model's parameters after a checkpoint written at the layout is read by one process.

Axes: B batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.registry import get, load_plugin
from evaluation.contracts.probe import Probe, probe, stir
from model.init import initialise
from model.output import Batch
from model.zoo import build_model

TOLERANCE = 1e-5
"""Largest difference from one process, relative to the largest entry of what is compared.

float32 sums taken in another order differ by some 1e-7 of the largest term; a wrong reduction
differs by a factor.
"""


class Ranks(Protocol):
    """A pool of processes that form one world."""

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Contract:
    """A layout to compare with one process. `needs` are the names a mechanism may declare."""

    name: str
    layout: dict[str, Any]
    needs: tuple[str, ...]
    recompute: str = "none"

    @property
    def world(self) -> int:
        sizes = [self.layout.get(axis, 1) for axis in ("replicate", "fsdp", "tp")]
        return int(torch.tensor(sizes).prod())


CONTRACTS = {
    contract.name: contract
    for contract in (
        Contract("tp", {"tp": 2}, ("tp",)),
        Contract("sp", {"tp": 2, "sequence_parallel": True}, ("tp", "sp")),
        Contract("fsdp", {"fsdp": 2}, ("fsdp",)),
        Contract("replicate", {"replicate": 2}, ("replicate",)),
        Contract("recompute", {}, ("recompute",), "block"),
        Contract("tp_fsdp", {"tp": 2, "fsdp": 2}, ("tp", "fsdp")),
        Contract("sp_hsdp", {"tp": 2, "sequence_parallel": True, "replicate": 2}, ("tp", "sp")),
    )
}
"""Contracts of 1, 2 and 4 processes, by name; those of 4 belong to the slow tests."""


@dataclass
class Step:
    """One training step: the loss, every gradient in full, and the gradients' global norm."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float


def sums(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss function of the proofs."""
    output = model(batch)
    result = {"loss": output.token_losses.sum(), "count": (batch["targets"] != -100).sum()}
    if output.losses:
        result["auxiliary"] = torch.stack(list(output.losses.values())).sum()
        result["samples"] = torch.tensor(batch["targets"].shape[0])
    return result


def step(name: str, layout: dict[str, Any], recompute: str, plugins: tuple[str, ...]) -> Step:
    """Run one step of a mechanism's probe under a layout; called alike on every rank."""
    from parallel.config import ParallelConfig
    from parallel.layout import Layout
    from parallel.native import NativeEngine

    for plugin in plugins:
        load_plugin(plugin)
    subject = probe(get(*name.split(":")))
    config = ParallelConfig(**layout)
    place = Layout.of(config, *_world())
    engine = NativeEngine(place, torch.device("cpu"), config)
    with torch.device("meta"):
        model = build_model(subject.config)
    engine.prepare(model, seed=0, recompute=recompute)  # type: ignore[arg-type]
    engine.load_model_state(_stirred(subject))
    share = subject.batch().items()
    size = 4 // engine.data_size
    first = engine.data_rank * size
    batch = {key: value[first : first + size] for key, value in share}
    held = engine.forward_backward([batch], sums)
    loss = engine.total(held["loss"]) / engine.total(held["count"].double())
    if "auxiliary" in held:
        loss = loss + engine.total(held["auxiliary"]) / engine.total(held["samples"].double())
    gradients = {
        key: _whole(p.grad) for key, p in engine.model.named_parameters() if p.grad is not None
    }
    return Step(float(loss), gradients, float(engine.clip_gradients(None)))


def _world() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def _stirred(subject: Probe) -> dict[str, Tensor]:
    """The probe's parameters in full."""
    model = subject.model()
    return {name: p.detach() for name, p in model.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def compare(one: Step, many: Step) -> None:
    """Assert that two steps agree."""
    assert abs(one.loss - many.loss) <= TOLERANCE * max(1.0, abs(one.loss)), (
        f"loss {many.loss:.8f}, on one process {one.loss:.8f}"
    )
    assert many.gradients.keys() == one.gradients.keys(), (
        f"gradients of {sorted(many.gradients.keys() ^ one.gradients.keys())} on one side only"
    )
    for name, expected in one.gradients.items():
        top = float(expected.abs().max())
        error = float((many.gradients[name] - expected).abs().max())
        assert error <= TOLERANCE * max(top, 1e-3), (
            f"gradient of {name} differs by {error:.2e}; its largest entry is {top:.2e}"
        )
    assert abs(one.norm - many.norm) <= TOLERANCE * one.norm, (
        f"gradient norm {many.norm:.8f}, on one process {one.norm:.8f}"
    )


def prove(
    contract: Contract, subject: Probe, ranks: Ranks | None, plugins: tuple[str, ...] = ()
) -> None:
    """Compare a layout with one process.

    Raises:
        AssertionError: with what differs.
    """
    name = f"{subject.entry.slot}:{subject.entry.name}"
    one = step(name, {}, "none", plugins)
    if contract.world == 1:
        compare(one, step(name, contract.layout, contract.recompute, plugins))
        return
    assert ranks is not None
    for many in ranks.run(step, name, contract.layout, contract.recompute, plugins):
        compare(one, many)


def write(name: str, folder: str, plugins: tuple[str, ...]) -> None:
    """On two ranks: write the probe's parameters, split over the tensor axis, as a checkpoint."""
    from checkpoints.store import CheckpointStore
    from parallel.config import ParallelConfig
    from parallel.layout import Layout
    from parallel.native import NativeEngine

    for plugin in plugins:
        load_plugin(plugin)
    subject = probe(get(*name.split(":")))
    config = ParallelConfig(tp=2) if _splits(subject) else ParallelConfig(fsdp=2)
    engine = NativeEngine(Layout.of(config, *_world()), torch.device("cpu"), config)
    with torch.device("meta"):
        model = build_model(subject.config)
    engine.prepare(model, seed=0)
    engine.load_model_state(_stirred(subject))
    CheckpointStore(Path(folder)).save(1, {"model": engine.model_state()})


def _splits(subject: Probe) -> bool:
    return "tp" not in subject.entry.cannot


def reshard(subject: Probe, ranks: Ranks, plugins: tuple[str, ...] = ()) -> None:
    """A checkpoint written by two processes is read by one, bit for bit."""
    from checkpoints.store import CheckpointStore

    with tempfile.TemporaryDirectory() as folder:
        ranks.run(write, f"{subject.entry.slot}:{subject.entry.name}", folder, plugins)
        model = build_model(subject.config)
        initialise(model, 1)
        state = {name: p.detach() for name, p in model.named_parameters()}
        CheckpointStore(Path(folder)).load({"model": state})
    for name, expected in _stirred(subject).items():
        assert torch.equal(state[name], expected), f"{name} differs after reading it back"


__all__ = ["CONTRACTS", "Contract", "compare", "prove", "reshard", "step", "stir"]
