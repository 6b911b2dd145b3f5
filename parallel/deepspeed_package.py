"""DeepSpeed itself: found, and told which device it is on.

It reads its device from the environment when it is imported, so it is imported through here alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from core.errors import UserError


def package(device: torch.device) -> Any:
    """The package, for work on `device`.

    Raises:
        UserError: if it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.engine: deepspeed is not installed; pip install 'manyforms[deepspeed]', or "
            "use parallel.engine=native"
        )
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists on one
    module = importlib.import_module("deepspeed")
    # A faster sum for inference on the CPU; nobody here uses it, and it would need a compiler.
    module.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").addFilter(_worth_saying)
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    return module


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not that it cannot look into streams: what returns them is not what it gathers."""
    return not str(record.msg).startswith("A module has unknown inputs or outputs type")


def join_alone() -> None:
    """A process group of one, where this process is part of no job: DeepSpeed needs a group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


def missing_for_nvme() -> str | None:
    """Why tensors cannot be kept on an NVMe disk here, None if they can."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        return None
    return (
        "DeepSpeed's asynchronous reads need libaio, its header and a C++ compiler (on Debian and "
        "Ubuntu: apt install libaio-dev g++)"
    )
