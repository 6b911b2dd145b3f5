"""The pipeline: this rank's stages, and the streams between them and those of other ranks.

PyTorch's schedules say what runs when (`torch.distributed.pipelining`); a stage here tells them how
to move a stream, of which each border passes what it holds (`parallel/border.py`). Every pipeline
rank reads the same batch, so only the stream travels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from model.output import Batch, ModelOutput
from model.stream import Stream
from parallel.border import Border
from parallel.collectives import settled
from parallel.config import ParallelConfig
from parallel.divisors import add
from parallel.engine import Sums
from parallel.gathered import let_go
from parallel.gradients import local
from parallel.schedules import SCHEDULES, check_micro_batches, stage_ranks
from parallel.stages import Chunk, Stages, layers
from parallel.work import Work, takes_work

Ending = Callable[[nn.Module, Batch], tuple[Tensor, Sums]]
"""Model and batch → what is differentiated, and the sums."""
Packed = tuple[Tensor, ...]


class StreamStage(PipelineStage):
    """A stage among others of a schedule.

    What streams hold at the stage's borders is told once for every shape of batch, by the rank
    before to the rank after, when the first of them passes.
    """

    def __init__(
        self,
        chunk: Chunk,
        index: int,
        ranks: list[int],
        device: torch.device,
        group: dist.ProcessGroup,
    ):
        # No shapes are given beforehand, and none are inferred: they come with the streams.
        super().__init__(
            chunk, index, len(ranks), device, input_args=(), output_args=(), group=group
        )
        self.stage_index_to_group_rank = dict(enumerate(ranks))
        self.chunk = chunk
        self.previous: StreamStage | None = None
        """The stage before, where it is on this rank too."""
        self.batches: list[Batch] = []
        self.finish: Callable[[Stream, int], Any] = lambda stream, number: stream
        self.run: Callable[[Callable[[], Any]], Any] = lambda work: work()
        self._key: tuple[Any, ...] = ()
        self._before: dict[tuple[Any, ...], Border] = {}
        self._after: dict[tuple[Any, ...], Border] = {}
        self._arrived: dict[int, Packed] = {}
        self._gradients: dict[int, tuple[Tensor | None, ...]] = {}

    def begin(
        self, batches: list[Batch], training: bool, finish: Callable[[Stream, int], Any]
    ) -> None:
        """Ready the stage for these micro-batches, alike in shape; `finish` is the last stage's."""
        self.batches, self.finish = batches, finish
        shapes = [(name, value.shape, value.dtype) for name, value in sorted(batches[0].items())]
        self._key = (*shapes, torch.is_grad_enabled(), training)
        self.clear_runtime_states()

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self._arrived.clear()
        self._gradients.clear()

    # Forward: the stream before, the chunk, the stream after.

    def get_fwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        border = self._before.get(self._key)
        if border is None:
            border = self._before[self._key] = self._recv_meta(self.stage_index - 1)
        self._arrived[number] = border.empty(self.device)
        return self._ops(dist.irecv, self._arrived[number], self.stage_index - 1)

    def forward_one_chunk(
        self,
        number: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = False,
    ) -> Any:
        """What passes on: the packed stream, or of the last stage what `finish` gives."""
        arrived = self._arrived.pop(number, ())
        stream: Stream | None = None
        if not self.is_first:
            border = self._before[self._key]
            for value, (_, grad) in zip(arrived, border.kinds, strict=True):
                value.requires_grad_(grad)
            stream = replace(border.unpack(arrived), scratch={})
        batch = self.batches[number]

        def work() -> Any:
            after = self.chunk(stream, batch)
            return self.finish(after, number) if self.is_last else self._pack(after)

        outputs = self.run(work)
        # Of these the backward pass reads how many there are.
        self._stage_meta.inputs = (None,) * len(arrived)  # type: ignore[assignment]
        self.fwd_cache[number] = ((outputs,) if self.is_last else outputs, list(arrived))
        return outputs

    def _pack(self, stream: Stream) -> Packed:
        stream = replace(stream, scratch={})  # whoever needs such a value derives it again
        border = self._after.get(self._key)
        if border is None:
            border = self._after[self._key] = Border.of(stream)
            if not self._is_same_rank(self.stage_index + 1):
                self._send_meta(border, self.stage_index + 1)
        return border.pack(stream)

    def get_fwd_send_ops(self, number: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        values = tuple(value.detach() for value in self.fwd_cache[number][0])
        return self._ops(dist.isend, values, self.stage_index + 1)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Take over what the stage before gave, on this rank."""
        assert self.previous is not None
        self._before[self._key] = self.previous._after[self._key]
        self._arrived[mb_index] = tuple(value.detach() for value in prev_stage_outputs)

    # Backward: gradients of the stream after, the chunk, gradients of the stream before.

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        room = self._after[self._key].empty_gradients(self.device)
        self._gradients[bwd_chunk_id] = room
        return self._ops(dist.irecv, room, self.stage_index + 1)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        return self._gradients.pop(bwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        return self._ops(dist.isend, self.get_local_bwd_output(bwd_chunk_id), self.stage_index - 1)

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """The gradients of the stream before; zeros where nothing came of a part of it."""
        border, found = self._before[self._key], self.bwd_cache.pop(mb_index)
        room = border.empty_gradients(self.device)
        return tuple(
            None if empty is None else empty.zero_() if value is None else settled(value)
            for value, empty in zip(found, room, strict=True)
        )

    def set_local_bwd_input(
        self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int
    ) -> None:
        """Take over what the stage after gave back, on this rank."""
        self._gradients[mb_index] = next_stage_bwd_outputs

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if not full_backward and not self.is_first:
            values, groups, *rest = self.backward_state[bwd_chunk_id]
            self.backward_state[bwd_chunk_id] = (values, _as_one(groups), *rest)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing: the engine reduces once all stages of the rank are done."""

    def _ops(self, way: Any, values: tuple[Tensor | None, ...], stage: int) -> list[dist.P2POp]:
        peer = self._resolve_peer_global_rank(stage)
        return [
            dist.P2POp(way, value.contiguous(), peer, self.group)
            for value in values
            if value is not None
        ]


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
        layered = SCHEDULES[config.schedule].layered
        self.ranks = stage_ranks(config, max(1, layers(model) // config.pp) if layered else None)
        stages = Stages(model, len(self.ranks), layers=layered)
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
        packed = border.pack(value) if mine else border.empty(self.device)
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


def _as_one(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of parameters of a backward pass in two halves, as one group.

    PyTorch visits them one after another in the second half, each freeing the graph behind it;
    where the ways to two groups overlap, as behind a decoder's embedding that reads no stream, the
    second would find nothing.
    """
    reached = [group for group in groups if group.get("grads")]
    held = [
        (node, gradient)
        for group in reached
        for node, gradient in zip(group["intermediates"], group["grads"], strict=True)
        if gradient is not None
    ]
    if not held:
        return []
    nodes, gradients = zip(*held, strict=True)
    parameters = set().union(*(group["params"] for group in reached))
    return [{"params": parameters, "intermediates": list(nodes), "grads": list(gradients)}]


class Arrived(nn.Module):
    """The model as a loss sees it on the last stage: a stream has come, and the end is left."""

    def __init__(self, end: Callable[[Stream, Batch], ModelOutput], stream: Stream, training: bool):
        super().__init__()
        self.training = training
        self._end, self._stream = end, stream

    def forward(self, batch: Batch) -> ModelOutput:
        return self._end(self._stream, batch)


def _start(ops: list[dist.P2POp]) -> list[dist.Work]:
    return list(dist.batch_isend_irecv(ops)) if ops else []
