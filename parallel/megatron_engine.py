"""The megatron engine: megatron-core's tensor-parallel layers, loss and groups.

FSDP2, DDP, the divisors of a step and the global norm are the native engine's; the leaves that
Megatron has layers for become its layers, and what crosses the tensor axis travels by its mappings.
Values, names, roles and checkpoints are the same as everywhere.

The package (`pip install 'manyforms[megatron]'`) is imported when an engine is made.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from core.registry import register
from parallel import megatron_groups as groups
from parallel.config import ParallelConfig
from parallel.engine import Precision, Recompute
from parallel.layout import Layout
from parallel.native import NativeEngine
from parallel.tensor import DataOperations


@register("engine", "megatron")
class MegatronEngine(NativeEngine):
    """Megatron-core's tensor-parallel layers, loss and groups, inside PyTorch's FSDP2 or DDP."""

    def __init__(self, layout: Layout, device: torch.device, config: ParallelConfig | None = None):
        groups.join(layout, device)
        super().__init__(layout, device, config)
        assert self._tensor_ranks() == dist.get_process_group_ranks(self._group("tp"))

    def _group(self, axis: str) -> dist.ProcessGroup:
        if axis != "tp":
            return super()._group(axis)
        group: dist.ProcessGroup = groups.require().get_tensor_model_parallel_group()
        return group

    def _tensor_ranks(self) -> list[int]:
        """The ranks of this one's tensor axis by our order."""
        first = self.layout.rank - self.layout.coordinates["tp"]
        return list(range(first, first + self.layout.tp))

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        precision: Precision = "fp32",
        recompute: Recompute = "none",
        compile: bool = False,
    ) -> None:
        super().prepare(model, seed=seed, precision=precision, recompute=recompute, compile=compile)
        from parallel.megatron_layers import mark

        mark(self.model, self._partial)

    def place(
        self, model: nn.Module, *, precision: Precision, recompute: Recompute, compile: bool
    ) -> None:
        super().place(model, precision=precision, recompute=recompute, compile=compile)
        from parallel.megatron_layers import adopt

        adopt(self.model, self.layout, self._group("tp"), self.device, recompute)

    def _operations(self, lazy: bool) -> DataOperations:
        from parallel.megatron_operations import MegatronDataOperations, MegatronOperations

        operations: DataOperations = MegatronDataOperations(self._data)
        if self.layout.tp > 1:
            sequence_parallel = self.layout.sequence_parallel
            operations = MegatronOperations(self._group("tp"), self._data, sequence_parallel)
        operations.dispatch = super()._operations(lazy).dispatch
        return operations

    def close(self) -> None:
        groups.leave()
        super().close()
