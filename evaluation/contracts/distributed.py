"""The proofs on several processes: the same model under a layout as on one process, in float32."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.store import CheckpointStore
from core.registry import load_plugin
from evaluation.contracts.parity import compare, filled, on_meta, start
from evaluation.contracts.probe import Probe
from evaluation.contracts.ranks import Ranks
from model.output import Batch
from model.roles import roles
from parallel.layout import AXES

TOLERANCE = 1e-5
"""Largest relative difference from one process; `parity` says relative to what.

float32 sums taken in another order differ by some 1e-7 of the largest term; a wrong reduction
differs by a factor.
"""


STEPS = 3
"""Optimizer steps over which the losses are compared too."""


@dataclass(frozen=True)
class Contract:
    """A layout to compare with one process. `needs` are the names a mechanism may declare.

    experts: it says nothing about models without experts.
    micro_batches: of how many the step is, on one process as well.
    steps: how many optimizer steps the losses are followed for.
    """

    layout: dict[str, Any]
    needs: tuple[str, ...]
    recompute: str = "none"
    experts: bool = False
    micro_batches: int = 1
    steps: int = STEPS

    @property
    def world(self) -> int:
        return math.prod(self.layout.get(axis, 1) for axis in AXES)


CONTRACTS = {
    "recompute": Contract({}, ("recompute",), "block"),
    "tp": Contract({"tp": 2}, ("tp",)),
    "sp": Contract({"tp": 2, "sequence_parallel": True}, ("tp", "sp")),
    "fsdp": Contract({"fsdp": 2}, ("fsdp",)),
    "replicate": Contract({"replicate": 2, "fsdp": 1}, ("replicate",)),
    "cp": Contract({"cp": 2}, ("cp",)),
    "ep": Contract({"ep": 2}, ("fsdp", "ep"), experts=True),
    "pp": Contract({"pp": 2}, ("pp",), micro_batches=2),
    "pp_zbv": Contract({"pp": 2, "schedule": "zbv"}, ("pp",), micro_batches=4),
    "tp_fsdp": Contract({"tp": 2, "fsdp": 2}, ("tp", "fsdp")),
    "sp_replicate": Contract(
        {"tp": 2, "sequence_parallel": True, "replicate": 2, "fsdp": 1}, ("tp", "sp", "replicate")
    ),
    "cp_tp": Contract({"cp": 2, "tp": 2}, ("cp", "tp")),
    "cp_sp": Contract({"cp": 2, "tp": 2, "sequence_parallel": True}, ("cp", "tp", "sp")),
    "cp_fsdp": Contract({"cp": 2, "fsdp": 2}, ("cp", "fsdp")),
    "cp_ep": Contract({"cp": 2, "ep": 2}, ("cp", "ep"), experts=True),
    "tp_ep": Contract({"tp": 2, "ep": 2}, ("tp", "fsdp", "ep"), experts=True),
    "ep_fsdp": Contract({"ep": 2, "fsdp": 2}, ("fsdp", "ep"), experts=True),
    "pp_tp": Contract({"pp": 2, "tp": 2}, ("pp", "tp"), micro_batches=2),
    "pp_fsdp": Contract({"pp": 2, "fsdp": 2}, ("pp", "fsdp"), micro_batches=2),
    "pp_cp": Contract({"pp": 2, "cp": 2}, ("language", "pp", "cp"), micro_batches=2),
    "pp_ep": Contract({"pp": 2, "ep": 2}, ("pp", "fsdp", "ep"), experts=True, micro_batches=2),
}
"""Contracts of 1, 2 and 4 processes, by name; those of 4 belong to the slow tests."""


def concerns(name: str, subject: Probe) -> bool:
    """Whether a contract says something about a mechanism.

    The context axis divides texts only; what is proven in a vision model is beside it.
    """
    if CONTRACTS[name].layout.get("cp", 1) > 1 and subject.config["kind"] == "vision":
        return False
    if not CONTRACTS[name].experts:
        return True
    known = roles(on_meta(subject.config))
    return any(role.expert is not None for role in known.values())


def prove(name: str, subject: Probe, ranks: Ranks | None, plugins: tuple[str, ...] = ()) -> None:
    """Compare a layout with one process: losses, also behind three optimizer steps, every gradient,
    the gradients' global norm.

    Raises:
        AssertionError: with what differs.
    """
    contract = CONTRACTS[name]
    if ranks is not None:
        ranks.run(load_plugins, plugins)
    found = compare(
        ranks if contract.world > 1 else None,
        subject.config,
        subject.batch(),
        {name: contract.layout},
        prepare={"recompute": contract.recompute},
        micro_batches=contract.micro_batches,
        stirred=True,
        steps=contract.steps,
    )[name]
    assert found.worst <= TOLERANCE, f"relative errors against one process: {found}"


def load_plugins(plugins: tuple[str, ...]) -> None:
    """On a rank: import the files that register what is to be proven."""
    for plugin in plugins:
        load_plugin(plugin)


def write(config: dict[str, Any], folder: str, layout: dict[str, Any]) -> None:
    """On a rank: write the probe's parameters under a layout, as a checkpoint."""
    engine = start(layout, config)
    values = filled(config, 0, True).named_parameters()
    engine.load_model_state({name: value.detach() for name, value in values})
    CheckpointStore(Path(folder)).save(1, {"model": engine.model_state()})


def reshard(subject: Probe, ranks: Ranks, plugins: tuple[str, ...] = ()) -> None:
    """A checkpoint that two processes wrote is read by one, bit for bit."""
    layout = {"tp": 2} if "tp" not in subject.entry.cannot else {"fsdp": 2}
    ranks.run(load_plugins, plugins)
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(write, subject.config, folder, layout)
        model = filled(subject.config, 1, False)
        state: Batch = {name: p.detach() for name, p in model.named_parameters()}
        CheckpointStore(Path(folder)).load({"model": state})
    for name, expected in filled(subject.config, 0, True).named_parameters():
        assert state[name].equal(expected), f"{name} differs after reading it back"
