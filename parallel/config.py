"""The `parallel:` section of a run's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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

    pp: int = 1
    """Pipeline stages; this version has 1."""

    ep: int = 1
    """Expert parallelism; this version has 1."""

    cp: int = 1
    """Context parallelism; this version has 1."""

    schedule: str = "1f1b"
    """The pipeline's schedule; of use with `pp` only, which this version has not."""

    zero_stage: int = 2
    """DeepSpeed's ZeRO stage; of use with that engine only, which this version has not."""

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

    @field_validator("engine", mode="before")
    @classmethod
    def _engine(cls, value: Any) -> Any:
        name = value.get("name") if isinstance(value, dict) else value
        if name in ("deepspeed", "megatron"):
            raise ValueError(f"the engine '{name}' is not in this version; use native")
        return value

    @model_validator(mode="after")
    def _later(self) -> ParallelConfig:
        for axis in ("pp", "ep", "cp"):
            size = getattr(self, axis)
            if size != 1:
                raise ValueError(f"{axis}: {size}: this version has no such axis; leave it at 1")
        if self.schedule != "1f1b":
            raise ValueError(
                f"schedule: '{self.schedule}': this version has no pipeline; leave it out"
            )
        if self.zero_stage != 2:
            raise ValueError(
                f"zero_stage: {self.zero_stage}: this version has no deepspeed engine; leave it out"
            )
        for axis in ("replicate", "fsdp"):
            if getattr(self, axis) == 0:
                raise ValueError(f"{axis}: 0: give a number of processes, or -1 for what is left")
        if self.replicate == -1 and self.fsdp == -1:
            raise ValueError("replicate and fsdp cannot both be -1: give one of them")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "sequence_parallel shares out tokens over the tensor axis; it needs tp above 1"
            )
        return self
