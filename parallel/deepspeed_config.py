"""What DeepSpeed is told, and what is refused before it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from core.errors import UserError
from parallel.config import ParallelConfig
from parallel.layout import Layout

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Offload:
    """Where optimizer state and parameters are kept; none: on the device that computes."""

    optimizer: Place = "none"
    parameters: Place = "none"
    nvme_path: str | None = None


def check(layout: Layout, config: ParallelConfig, offload: Offload) -> None:
    """Everything that can be refused without DeepSpeed.

    Raises:
        UserError: for the first setting that cannot work, with what to do.
    """
    stage = config.zero_stage
    native = "use parallel.engine=native"
    if layout.pp > 1:
        raise UserError(
            f"parallel.pp: {layout.pp} is not for the deepspeed engine: its pipeline passes "
            f"tensors from layer to layer, and a stream is more; {native}, or parallel.pp=1"
        )
    if layout.ep > 1 and stage == 3:
        raise UserError(
            "parallel.zero_stage: 3 divides parameters over all data ranks, and DeepSpeed knows "
            "experts of their own groups there only as layers of its own; use "
            "parallel.zero_stage=2, or parallel.ep=1 (every rank then keeps a part of each expert)"
        )
    for option in ("keep_gathered", "reduce_every_micro_batch"):
        if getattr(config, option):
            raise UserError(f"parallel.{option} is FSDP2's; remove it, or {native}")
    where = "parallel.engine"
    if offload.optimizer != "none" and stage == 0:
        raise UserError(
            f"{where}.offload_optimizer: at zero_stage 0 DeepSpeed holds no optimizer state; use "
            "parallel.zero_stage=1, 2 or 3"
        )
    if offload.parameters != "none" and stage < 3:
        raise UserError(
            f"{where}.offload_parameters: below zero_stage 3 every rank computes with parameters "
            "that stay where they are; use parallel.zero_stage=3"
        )
    if offload.optimizer == "nvme":
        _check_nvme(where, stage, offload)
    elif offload.nvme_path is not None:
        raise UserError(f"{where}.nvme_path: nothing is offloaded to nvme; remove it")


def _check_nvme(where: str, stage: int, offload: Offload) -> None:
    if stage < 3:
        raise UserError(
            f"{where}.offload_optimizer: nvme needs parallel.zero_stage=3; below it, use cpu"
        )
    if offload.nvme_path is None:
        raise UserError(f"{where}.nvme_path: name the folder on the NVMe disk to offload to")
    if not Path(offload.nvme_path).is_dir():
        raise UserError(f"{where}.nvme_path: {offload.nvme_path} is no folder")


def settings(stage: int, offload: Offload, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    It neither divides by micro-batches nor clips: the engine does. Gradients are summed; ZeRO-3
    knows only means, which the engine undoes.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": device.type == "cuda",
        "memory_efficient_linear": False,  # it would replace torch's linear for everybody
        "stage3_param_persistence_threshold": 0,  # blocks are gathered whole, with all their parts
    }
    if stage in (1, 2) and offload.optimizer == "none":
        zero["compute_grad_norm"] = False
    pinned = device.type == "cuda"
    for key, place in (
        ("offload_optimizer", offload.optimizer),
        ("offload_param", offload.parameters),
    ):
        if place != "none":
            path = {"nvme_path": offload.nvme_path} if place == "nvme" else {}
            zero[key] = {"device": place, "pin_memory": pinned, **path}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only its own statistics read this
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW, wherever the state is
        "zero_optimization": zero,
    }
