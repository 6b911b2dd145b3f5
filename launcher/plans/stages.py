"""A pipeline of fake ranks: what its stages would have told each other, told beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launcher.config import RunConfig
from launcher.plans.even import even_experts
from launcher.plans.fake import empty_batch, fake_ranks
from model.stream import Stream
from model.zoo import build_model
from parallel.border import Border
from parallel.layout import Layout
from parallel.native import NativeEngine
from parallel.pipeline import Pipeline
from parallel.schedules import stage_ranks
from parallel.stages import Stages
from parallel.stream_stage import StreamStage


def borders(config: RunConfig, layout: Layout, micro_batch: int) -> list[Border]:
    """What the stream holds behind each stage but the last, by running all stages in one place.

    Along the data axes every rank's stream is alike, so these are left out.
    """
    alone = config.parallel.replace(pp=1, ep=1, fsdp=1, replicate=1, schedule="1f1b")
    inside = Layout(tp=layout.tp, cp=layout.cp, sequence_parallel=layout.sequence_parallel)
    with fake_ranks(inside.world, 0):
        with torch.device("meta"):
            model = build_model(config.model)
        engine = NativeEngine(inside, torch.device("cpu"), alone)
        train = config.train
        engine.place(model, precision=train.precision, recompute=train.recompute, compile=False)
        count = len(stage_ranks(config.parallel))
        chunks = Stages(model, count).take(model, range(count))
        bf16 = train.precision == "bf16"
        found: list[Border] = []
        with FakeTensorMode(allow_non_fake_inputs=True):
            engine.materialise()
            even_experts(model)
            batch = empty_batch(config, micro_batch)
            stream: Stream | None = None
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                for chunk in chunks[:-1]:
                    stream = chunk(stream, batch)
                    assert stream is not None
                    stream.scratch.clear()
                    found.append(Border.of(stream))
    return found


def tell(pipeline: Pipeline, known: list[Border]) -> None:
    """Let the stages of this rank know their borders, and the sums, without being told."""
    for stage in pipeline.stages:
        _tell_stage(stage, known)
    mine = pipeline.last == pipeline.group.rank()

    def from_last(held: Any) -> Any:
        sums = ("loss", "count", "samples")
        return held if mine else {name: torch.zeros(()) for name in sums}

    told: Any = pipeline
    told.from_last = from_last


def _tell_stage(stage: StreamStage, known: list[Border]) -> None:
    told: Any = stage
    told._recv_meta = lambda index: known[index]
    told._send_meta = lambda border, index: None
    told._warmup_forward_vote = lambda backward, received_acc=None: None
    told._warmup_backward_result = lambda received_result=None: _Yes()


class _Yes:
    """The other stages' vote: their shapes are known."""

    def item(self) -> int:
        return 1
