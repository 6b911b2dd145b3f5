"""The `parallel:` section of a run's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from core.config import Config
from core.registry import Slot

_Size = Annotated[int, Field(ge=-1)]


class ParallelConfig(Config):
    """How many processes share the work, and along which axes."""

    engine: Annotated[Any, Slot("engine")] = "native"
    """What runs the model on many devices."""

    replicate: _Size = 1
    """Copies of the model that split the batch between them; -1: what is left of the processes."""

    fsdp: _Size = -1
    """Processes that split the batch and the parameters (FSDP2); -1: what is left. With
    `replicate` above 1 as well this is HSDP."""

    tp: Annotated[int, Field(ge=1)] = 1
    """Processes that split heads, channels and vocabulary between them (tensor parallelism)."""

    sequence_parallel: bool = False
    """Between sublayers each process of the tensor axis holds its share of the tokens."""

    pp: Annotated[int, Field(ge=1)] = 1
    """Pipeline stages: processes that hold consecutive blocks and pass the stream on."""

    ep: Annotated[int, Field(ge=1)] = 1
    """Processes that split the batch and the experts; tokens travel to their experts and back."""

    cp: Annotated[int, Field(ge=1)] = 1
    """Processes that split the tokens of a sample, inside sublayers too (context parallelism)."""

    cp_method: Literal["ring", "heads", "gather"] = "ring"
    """How attention sees the whole context: `ring` passes keys and values round (2310.01889),
    `heads` trades tokens for heads and back (Ulysses, 2309.14509), `gather` collects keys and
    values (2407.21783). Mixers that can do none of these gather their input."""

    schedule: Literal[
        "gpipe",
        "1f1b",
        "interleaved_1f1b",
        "interleaved_zero_bubble",
        "zbv",
        "dualpipev",
        "modular",
    ] = "1f1b"
    """The pipeline's schedule; of use with `pp` only. `modular` deals the layers out one by one."""

    virtual_stages: Annotated[int, Field(ge=2)] = 2
    """Stages that each process of the pipeline holds, under the interleaved schedules."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed divides between data ranks: 1 optimizer state, 2 gradients too, 3 parameters
    too, 0 nothing. Of use with that engine only, where `replicate` and `fsdp` are one axis."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """What carries the messages; auto: nccl between GPUs, gloo between CPUs."""

    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a process that waits for the others gives up."""

    keep_gathered: bool = False
    """FSDP: keep a block's gathered parameters from its forward to its backward pass: less
    communication, more memory."""

    reduce_every_micro_batch: bool = False
    """FSDP: reduce gradients after every micro-batch, not once a step: more communication, but
    whole gradients are never held."""

    accumulation: Literal["in_turn", "layered"] = "in_turn"
    """FSDP: a step's micro-batches one after another, or `layered`: each layer takes all of them
    before the next one does, so that parameters are gathered once a pass (2106.02679)."""

    @model_validator(mode="after")
    def _possible(self) -> ParallelConfig:
        for axis in ("replicate", "fsdp"):
            if getattr(self, axis) == 0:
                raise ValueError(f"{axis}: 0: give a number of processes, or -1 for what is left")
        if self.replicate == -1 and self.fsdp == -1:
            raise ValueError("replicate and fsdp cannot both be -1: give one of them")
        engine = self.engine if isinstance(self.engine, str) else self.engine.name
        if self.zero_stage != 2 and engine != "deepspeed":
            raise ValueError("zero_stage is DeepSpeed's; it needs engine: deepspeed")
        if self.accumulation == "layered":
            if engine != "native":
                raise ValueError("accumulation: layered is the native engine's")
            if self.pp > 1:
                raise ValueError("accumulation: layered; with pp above 1 use schedule: modular")
        if self.schedule != "1f1b" and self.pp == 1:
            raise ValueError(f"schedule: '{self.schedule}' is a pipeline's; it needs pp above 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "sequence_parallel shares out tokens over the tensor axis; it needs tp above 1"
            )
        return self
