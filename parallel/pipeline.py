"""The pipeline: this rank's stages, and the streams between them and those of other ranks.

PyTorch's schedules say what runs when (`torch.distributed.pipelining`), a stage how a stream moves
(`parallel/stream_stage.py`). Every pipeline rank reads the same batch, so only the stream travels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class

from model.output import Batch, ModelOutput
from model.stream import Stream
from parallel.border import Border
from parallel.config import ParallelConfig
from parallel.divisors import add
from parallel.engine import Sums
from parallel.gathered import let_go
from parallel.gradients import local
from parallel.schedules import SCHEDULES, check_micro_batches
from parallel.stages import cut
from parallel.stream_stage import StreamStage
from parallel.work import Arrived, Ending, Work, takes_work


class Pipeline:
    """This rank's stages of a model. Making it drops from the model what other ranks hold.

    Args:
        model: whole, on the meta device.
        group: the ranks of the pipeline axis.

    Raises:
        UserError: if the model cannot be cut into so many stages.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ParallelConfig,
        device: torch.device,
        group: dist.ProcessGroup,
    ):
        self.config, self.device, self.group = config, device, group
        stages, self.ranks = cut(model, config)
        self.holders = stages.holders(model, self.ranks)
        """Every parameter of the whole model, and the pipeline ranks that hold it."""
        own = [index for index, rank in enumerate(self.ranks) if rank == group.rank()]
        chunks = stages.take(model, own)
        self.stages = [
            StreamStage(chunk, index, self.ranks, device, group)
            for index, chunk in zip(own, chunks, strict=True)
        ]
        for before, after in pairwise(self.stages):
            if after.stage_index == before.stage_index + 1:
                after.previous = before
        self.model = model
        self._end: Callable[[Stream, Batch], ModelOutput] = model.finish  # type: ignore[assignment]
        takes_work(model, self._forward)
        model.here = False  # type: ignore[assignment]
        self._schedules: dict[int, Any] = {}

    @property
    def last(self) -> int:
        """The pipeline rank of the last stage."""
        return self.ranks[-1]

    def run(
        self,
        batches: list[Batch],
        ending: Ending,
        context: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> Sums:
        """Forward and backward of a step's micro-batches; its sums, alike on every rank.

        Args:
            context: entered around every forward pass.

        Raises:
            UserError: if the schedule cannot run so many micro-batches.
        """
        check_micro_batches(self.config, len(batches))
        held: Sums = {}

        def finish(stream: Stream, number: int) -> Tensor:
            root, sums = ending(Arrived(self._end, stream, self.model.training), batches[number])
            add(held, sums)
            return root

        def through(work: Callable[[], Any]) -> Any:
            with context():
                return self.model(Work(work))

        for stage in self.stages:
            stage.begin(batches, self.model.training, finish)
            stage.run = through
        count = len(batches)
        target = torch.arange(count) if self.last == self.group.rank() else None
        self._schedule(count).step(target=target, return_outputs=False)
        for stage in self.stages:
            stage.clear_runtime_states()
        sums: Sums = self.from_last(held)
        return sums

    def _schedule(self, micro_batches: int) -> Any:
        """PyTorch's schedule for so many micro-batches."""
        if micro_batches not in self._schedules:
            known = SCHEDULES[self.config.schedule]
            kind = get_schedule_class(known.torch)
            self._schedules[micro_batches] = kind(
                self.stages[0] if known.stages == 1 else self.stages,
                micro_batches,
                loss_fn=lambda root, number: root,
                scale_grads=False,
            )
        return self._schedules[micro_batches]

    def _forward(self, batch: Batch) -> ModelOutput:
        """The model's output on every rank, without gradients."""
        if torch.is_grad_enabled():
            raise TypeError("a model in a pipeline gets its gradients from forward_backward alone")
        output: ModelOutput | None = None

        def finish(stream: Stream, number: int) -> ModelOutput:
            return self._end(stream, batch)

        sent: list[dist.Work] = []
        for stage in self.stages:
            stage.begin([batch], self.model.training, finish)
            stage.run = lambda work: work()
        for stage in self.stages:
            for receipt in _start(stage.get_fwd_recv_ops(0) if stage.previous is None else []):
                receipt.wait()
            given = stage.forward_one_chunk(0, ())
            after = next((other for other in self.stages if other.previous is stage), None)
            if stage.is_last:
                output = given
            elif after is not None:
                after.set_local_fwd_input(given, 0)
            else:
                sent += _start(stage.get_fwd_send_ops(0))
        for work in sent:
            work.wait()
        for stage in self.stages:
            stage.clear_runtime_states()
        let_go(self.model)
        parts = None
        if output is not None:
            parts = (output.token_losses, output.logits, output.losses, output.metrics)
        return ModelOutput(*self.from_last(parts))

    def from_last(self, value: Any) -> Any:
        """A tree of tensors that the last stage has, on every rank."""
        mine = self.last == self.group.rank()
        told = [Border.of(value) if mine else None]
        dist.broadcast_object_list(told, group=self.group, group_src=self.last, device=self.device)
        border = told[0]
        assert border is not None
        room = (border.room(kind, self.device) for kind in border.kinds)
        packed = border.pack(value) if mine else tuple(room)
        for part in packed:
            dist.broadcast(part, group=self.group, group_src=self.last)
        return border.unpack(packed)

    @torch.no_grad()
    def sum_shared(self) -> None:
        """Sum the gradients of parameters that several stages hold, such as a tied table.

        Each holder adds up all parts in order of rank, so that they stay alike to the bit.
        """
        mine = self.group.rank()
        for name, parameter in self.model.named_parameters():
            ranks = self.holders[name]
            if len(ranks) == 1 or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own = local(parameter.grad).contiguous()
            parts = {rank: own if rank == mine else torch.empty_like(own) for rank in ranks}
            others = [rank for rank in ranks if rank != mine]
            ops = [dist.P2POp(dist.isend, own, group=self.group, group_peer=r) for r in others]
            ops += [
                dist.P2POp(dist.irecv, parts[r], group=self.group, group_peer=r) for r in others
            ]
            for receipt in _start(ops):
                receipt.wait()
            local(parameter.grad).copy_(torch.stack([parts[rank] for rank in ranks]).sum(0))


def _start(ops: list[dist.P2POp]) -> list[dist.Work]:
    return list(dist.batch_isend_irecv(ops)) if ops else []
