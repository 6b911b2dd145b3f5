"""`manyforms doctor`: what this machine has and what is missing, in plain words."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Package:
    """An optional package: what it brings, and the extra that installs it."""

    name: str
    extra: str
    brings: str


OPTIONAL = [
    Package("deepspeed", "deepspeed", "the deepspeed engine: ZeRO 1-3, CPU and NVMe offload"),
    Package("megatron-core", "megatron", "the megatron engine: its layers, loss and DDP"),
    Package("flash-attn", "gpu", "attention backend flash on NVIDIA GPUs"),
    Package("liger-kernel", "gpu", "fused losses, norms and gated feed-forwards on GPUs"),
    Package("torchao", "gpu", "fp8 training and quantisation"),
    Package("lm-eval", "eval", "downstream suites of the LM Evaluation Harness"),
    Package("s3fs", "s3", "data and checkpoints in S3 object stores"),
]


def report() -> str:
    """The whole report, a fact a line."""
    sections = [
        ("This machine", machine()),
        ("PyTorch", pytorch()),
        ("Optional packages (nothing here is needed to train)", packages()),
    ]
    return "\n\n".join(
        title + "\n" + "\n".join(f"  {name:<16}{text}" for name, text in facts)
        for title, facts in sections
    )


def machine() -> Iterator[tuple[str, str]]:
    """Interpreter, processors, memory and disk."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "processors", f"{usable_cpus()} usable of {os.cpu_count()}"
    yield "memory", _memory()
    disk = shutil.disk_usage(Path.cwd())
    yield "disk here", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} ({Path.cwd()})"


def usable_cpus() -> int:
    """Processors that this process may use, which in a container may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        free = page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return "this system does not say"
    return f"{total / GIB:.1f} GiB, {free / GIB:.1f} free{_limit(total)}"


def _limit(total: int) -> str:
    """The control group's limit, where it is below the machine's memory."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(name).read_text())
        except (OSError, ValueError):
            continue
        if limit < total:
            return f"; this container may use {limit / GIB:.1f}"
    return ""


def pytorch() -> Iterator[tuple[str, str]]:
    """The installed torch and what it can reach."""
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        yield "torch", f"missing ({error}); install it as on https://pytorch.org"
        return
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{facts.name}, {facts.total_memory / GIB:.0f} GiB"
    elif torch.version.cuda or torch.version.hip:
        yield "GPU", "none found, though this torch is built for them: runs use the processors"
    else:
        yield "GPU", "this torch is built without GPUs: runs use the processors"
    if not dist.is_available():
        yield "distributed", "missing from this torch: only one process can train"
        return
    nccl, gloo = dist.is_nccl_available(), dist.is_gloo_available()
    yield "NCCL", "yes: processes on GPUs can talk" if nccl else "no: needed only between GPUs"
    yield "gloo", "yes: processes on CPUs can talk" if gloo else "no: needed between CPU processes"


def packages() -> Iterator[tuple[str, str]]:
    """Every optional package: its version, or what it would bring and how to get it."""
    for package in OPTIONAL:
        try:
            yield package.name, f"{metadata.version(package.name)}: {package.brings}"
            if package.name == "deepspeed" and not find_library("aio"):
                yield "", "offload to NVMe: needs libaio (Debian, Ubuntu: apt install libaio-dev)"
        except metadata.PackageNotFoundError:
            yield (
                package.name,
                f"not installed; would bring {package.brings}; "
                f"pip install 'manyforms[{package.extra}]'",
            )
