"""Joining the job: which rank this process is, its device, its process group, its engine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from core.errors import UserError
from parallel import watchdog
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.inflight import Recorder
from parallel.layout import Layout


@dataclass(frozen=True)
class Place:
    """This process among those of the job; `local_rank` counts on one machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "localhost"
    port: int = 29500


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place in a job that torchrun or srun started; None outside of one.

    Raises:
        UserError: if a variable is not a number.
    """

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name, "" if default is None else str(default))
        try:
            return int(text)
        except ValueError:
            raise UserError(f"the environment variable {name} is '{text}', not a number") from None

    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = number("RANK")
        return Place(
            rank,
            number("WORLD_SIZE"),
            number("LOCAL_RANK", rank),
            environment.get("MASTER_ADDR", "localhost"),
            number("MASTER_PORT", 29500),
        )
    # Of a batch script itself, which is no task of a step, srun's STEP variables say nothing.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return Place(
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS"),
            number("SLURM_LOCALID", 0),
            environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            number("MASTER_PORT", 20000 + number("SLURM_JOB_ID") % 20000),
        )
    return None


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[03-07,9],login` → `gpu03`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "") + (match[3] or "")


def device_for(config: ParallelConfig, local_rank: int) -> torch.device:
    """This process's GPU; the CPU where there is none or the messages go through gloo.

    Raises:
        UserError: for nccl without GPUs, or more processes than GPUs on a machine.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.backend == "nccl" and not gpus:
        raise UserError("parallel.backend: nccl needs NVIDIA GPUs, and this machine has none")
    if not gpus or config.backend == "gloo":
        return torch.device("cpu")
    if local_rank >= gpus:
        raise UserError(
            f"this machine has {gpus} GPUs, too few for a process with local rank {local_rank}; "
            f"start at most {gpus}, or use parallel.backend=gloo to train on the CPU"
        )
    return torch.device("cuda", local_rank)


def join(config: ParallelConfig, environment: Mapping[str, str] = os.environ) -> Engine:
    """Join the job this process is part of, or be the only process of one; the engine for it.

    A process group that exists already is used.

    Raises:
        UserError: if the layout does not fit the number of processes or the machine.
        PeerFailure: if another rank died meanwhile.
    """
    here = place(environment) or Place()
    layout = Layout.of(config, here.world, here.rank)
    device = device_for(config, here.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if here.world > 1 and not dist.is_initialized():
        recorder = Recorder()
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=_meeting(here, environment),
                rank=here.rank,
                world_size=here.world,
                timeout=timedelta(seconds=config.timeout),
                device_id=device if device.type == "cuda" else None,
            )
        except dist.DistError as error:
            raise UserError(
                f"rank {here.rank} of {here.world} could not reach the others at "
                f"{here.address}:{here.port}: {error}"
            ) from None
        except RuntimeError as error:
            if not watchdog.is_lost_connection(error):
                raise
            raise watchdog.PeerFailure(
                f"rank {here.rank} of {here.world}: another rank died or hung while the job was "
                f"being joined, or a firewall is between them: {error}"
            ) from error
        launcher = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        watchdog.start(config.timeout, recorder, hosted=None if launcher else 0)
    engine: Engine = config.engine.build(layout=layout, device=device, config=config)
    return engine


def _meeting(here: Place, environment: Mapping[str, str]) -> str:
    # Under torch's launcher env:// shares the launcher's own store, which already has the port.
    if "RANK" in environment and "MASTER_ADDR" in environment:
        return "env://"
    return f"tcp://{here.address}:{here.port}"
