"""Parameters and operations of a run's model."""

from __future__ import annotations

from typing import Any

from torch import nn

from data_pipeline.data import Data
from model.leaves import roles


def count_run(model: nn.Module, data: Data) -> tuple[dict[str, Any], float | None]:
    """Counts for the summary, and training operations per sample where they can be counted."""
    known = roles(model)
    by_kind: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        kind = known[name].kind
        by_kind[kind] = by_kind.get(kind, 0) + parameter.numel()
    return {"parameters": sum(by_kind.values()), "parameters_by_kind": by_kind}, None
