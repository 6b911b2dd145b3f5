"""The megatron engine: megatron-core's tensor-parallel layers, loss and groups.

The leaves that Megatron has layers for become its layers, and what crosses the tensor axis travels
by its mappings. The divisors of a step, the global norm, FSDP2 and the other axes are the native
engine's, with Megatron's DDP over `replicate` on request. Values, names, roles and checkpoints are
the same as everywhere.

The package (`pip install 'manyforms[megatron]'`) is imported when an engine is made.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from core.errors import UserError
from core.registry import register
from model.leaves import leaves
from model.output import Batch
from parallel import megatron_groups as groups
from parallel.config import ParallelConfig
from parallel.engine import LossFunction, Precision, Recompute, Sums
from parallel.gradients import local, sum_over
from parallel.layout import Layout
from parallel.native import NativeEngine
from parallel.tensor import DataOperations

if TYPE_CHECKING:
    from parallel.megatron_ddp import Buckets


@register("engine", "megatron")
class MegatronEngine(NativeEngine):
    """Megatron-core's tensor-parallel layers, loss and groups, inside PyTorch's FSDP2 or DDP.

    Args:
        ddp: Megatron's DistributedDataParallel over `replicate` in place of PyTorch's: gradients in
            contiguous fp32 buffers, reduced bucket by bucket during the backward pass.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        config: ParallelConfig | None = None,
        *,
        ddp: bool = False,
    ):
        if ddp and (layout.shard > 1 or layout.pp > 1):
            raise UserError(
                f"parallel.engine: megatron's ddp goes over replicate and tp alone, and this "
                f"layout is {layout}; use parallel.fsdp=1, or leave ddp out for FSDP2"
            )
        groups.join(layout, device)
        super().__init__(layout, device, config)
        self.ddp = ddp
        self._buckets: Buckets | None = None  # once a step has shown which parameters are used
        assert self._tensor_ranks() == dist.get_process_group_ranks(self._group("tp"))

    @property
    def _sharded(self) -> bool:
        return not self.ddp and super()._sharded

    @property
    def _replicated(self) -> bool:
        return not self.ddp and super()._replicated

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
        from parallel.megatron_operations import MegatronAlone, MegatronOperations

        operations: DataOperations = MegatronAlone(self._data)
        if self.layout.tp > 1:
            sequence_parallel = self.layout.sequence_parallel
            operations = MegatronOperations(self._group("tp"), self._data, sequence_parallel)
        operations.dispatch = super()._operations(lazy).dispatch
        return operations

    def forward_backward(self, batches: list[Batch], loss: LossFunction) -> Sums:
        if self._buckets is not None:
            self._buckets.begin()
        return super().forward_backward(batches, loss)

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Any:
        outer = (
            contextlib.nullcontext() if self._buckets is None else self._buckets.micro_batch(last)
        )
        with outer, super()._synchronised(last):
            yield

    def _finish(self, sums: Sums, known: Sums | None) -> None:
        if self._buckets is not None:
            self._buckets.finish()
        elif self.ddp:
            self._first_step()
        super()._finish(sums, known)

    def _first_step(self) -> None:
        """Sum the first step's gradients here, and set DDP up for the parameters that have any."""
        from parallel.megatron_ddp import Buckets, used

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        found = used(trained, self._data)
        if self._data is not None:
            sum_over([local(p.grad) for p in found if p.grad is not None], self._data)
        self._buckets = Buckets(found)
        for _, leaf in leaves(self.model):
            leaf.ops.twins = self._buckets.twins  # type: ignore[attr-defined]

    def close(self) -> None:
        groups.leave()
        super().close()
