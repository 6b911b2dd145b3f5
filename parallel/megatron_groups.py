"""Megatron-core's process groups, and what the package takes for granted about GPUs.

Its `parallel_state` is global to the process: made once for a layout, used by its layers and by the
tensor axis of this engine, and left when the engine leaves the job.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from core.errors import UserError
from parallel.layout import Layout

TESTED = "0.16"
"""The releases of megatron-core that this engine is made for; it leans on what is not public."""
ORDER = "tp-cp-ep-dp-pp"
"""Megatron's order of ranks, fastest first; ours (`parallel/layout.py`) read backwards."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without what importing the package says about the optional packages it would like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def require() -> Any:
    """The module `megatron.core.parallel_state`.

    Raises:
        UserError: where the package is missing, of another release, or does not import.
    """
    install = "pip install 'manyforms[megatron]'"
    try:
        with quiet():
            from megatron.core import parallel_state
    except ImportError as error:
        missing = (error.name or "").split(".")[0] == "megatron"
        why = "" if missing else f" ({error})"
        raise UserError(
            f"parallel.engine: megatron needs the package megatron-core{why}: {install}"
        ) from None
    found = metadata.version("megatron-core")
    if not found.startswith(f"{TESTED}."):
        raise UserError(
            f"parallel.engine: megatron is made for megatron-core {TESTED}, and {found} is "
            f"installed: {install}"
        )
    return parallel_state


_joined: tuple[Any, tuple[int, ...]] | None = None
"""The world and the layout that Megatron's groups were made for."""


def join(layout: Layout, device: torch.device) -> None:
    """Make Megatron's groups for a layout, or keep those there are; a collective.

    One process becomes a world of one, since Megatron's layers ask for a group in any case.
    """
    global _joined
    state = require()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    held = (dist.group.WORLD, layout.shape)
    _allocate_on(device)
    if _joined == held and state.model_parallel_is_initialized():
        return
    state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        order=ORDER,
        create_gloo_process_groups=False,
    )
    _joined = held


def leave() -> None:
    """Forget Megatron's groups; the process group of the job is left to its owner."""
    global _joined
    if _joined is not None:
        require().destroy_model_parallel()
        _joined = None


class _TorchOnCpu:
    """torch as two modules of Megatron see it where they run on the CPU."""

    class cuda:  # noqa: N801
        @staticmethod
        def current_device() -> torch.device:
            return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _allocate_on(device: torch.device) -> None:
    """Where Megatron's mappings and DDP allocate what they gather and reduce.

    They ask for the current CUDA device whatever their input is on; on the CPU they are told that
    it is the CPU. This is the one thing that the engine changes in the package.
    """
    with quiet():
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.tensor_parallel import mappings
    for module in (mappings, param_and_grad_buffer):
        module.torch = torch if device.type == "cuda" else _TorchOnCpu()
    # The package calls two collectives by names that torch has changed since.
    renamed = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
