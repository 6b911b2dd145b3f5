"""A stage of a pipeline as PyTorch's schedules run it, with whole streams at its borders.

A schedule asks a stage for messages to send and to receive, and to compute one micro-batch; it
never looks into them (`torch.distributed.pipelining.PipelineStage`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from model.output import Batch
from model.stream import Stream
from parallel.border import Border
from parallel.collectives import settled
from parallel.stages import Chunk

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
        self._arrived[number] = tuple(border.room(kind, self.device) for kind in border.kinds)
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
        border = self._after[self._key]
        room = tuple(border.room(k, self.device) if k[1] else None for k in border.kinds)
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
        return tuple(
            settled(value)
            if value is not None
            else (border.room(kind, self.device).zero_() if kind[1] else None)
            for value, kind in zip(found, border.kinds, strict=True)
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
