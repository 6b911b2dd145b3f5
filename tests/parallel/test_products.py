"""Products of axes on eight processes: outputs, every gradient and the norm as on one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from core.registry import get
from evaluation.contracts.distributed import TOLERANCE
from evaluation.contracts.parity import compare
from evaluation.contracts.probe import Probe
from evaluation.contracts.ranks import Ranks

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2×pp2×fsdp2": {"tp": 2, "pp": 2, "fsdp": 2},
    "tp2+sp×pp2×fsdp2, zbv": {
        "tp": 2, "pp": 2, "fsdp": 2, "sequence_parallel": True, "schedule": "zbv",
    },
    "tp2×ep2×fsdp2": {"tp": 2, "ep": 2, "fsdp": 2},
    "pp2×ep2×cp2": {"pp": 2, "ep": 2, "cp": 2, "fsdp": 1},
    "hsdp2×2×tp2": {"replicate": 2, "fsdp": 2, "tp": 2},
}  # fmt: skip
BLOCK: dict[str, Any] = {
    "norm": "rmsnorm",
    "mixer": {"name": "attention", "heads": 4, "kv_heads": 2},
    "position": "rope",
    "feedforward": {"name": "moe", "experts": 4, "ratio": 2.0, "shared": 1, "z": 0.001},
}
MODELS: dict[str, dict[str, Any]] = {
    "moe and ladder": {**BLOCK, "residual": "ladder"},
    "moe and several streams": {**BLOCK, "residual": "hyper_connections"},
    "moe and all states before": {**BLOCK, "residual": "denseformer"},
    "moe and first values": {**BLOCK, "mixer": {"name": "resformer", "heads": 4, "kv_heads": 2}},
}


@pytest.fixture(scope="module")
def eight_ranks() -> Iterator[Ranks]:
    pool = Ranks(8)
    yield pool
    pool.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_eight_processes_equal_one(name: str, layout: str, eight_ranks: Ranks) -> None:
    config: dict[str, Any] = {
        "kind": "language", "architecture": "decoder", "dim": 32, "depth": 4, "vocab": 64,
        "max_length": 24, "tie_embeddings": True, "block": MODELS[name],
    }  # fmt: skip
    batch = Probe(get("feedforward", "moe"), config).batch(size=8)
    found = compare(
        eight_ranks, config, batch, {layout: LAYOUTS[layout]}, micro_batches=2, stirred=True
    )[layout]
    # Scalars are summed over the tokens of eight parts in another order, by which they differ more
    # than what two parts give; a wrong sum is off by a factor.
    assert found.worst <= 2 * TOLERANCE, str(found)
