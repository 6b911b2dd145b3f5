"""What GPUs can do, from their makers' data sheets; dense rates, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import UserError, hint


@dataclass(frozen=True)
class Gpu:
    """flops: bf16 tensor-core operations a second; float32: the same for fp32 matrices in TF32.

    memory, bandwidth: bytes, and bytes a second, of its own memory.
    link: bytes a second it can send to the others of its node.
    network: bytes a second it can send to other nodes, one adapter for each GPU.
    per_node: GPUs of a node that `link` joins.
    """

    name: str
    flops: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 156e12, 80e9, 2.039e12, 300e9, 25e9),
        Gpu("h100", 989.4e12, 494.7e12, 80e9, 3.35e12, 450e9, 50e9),
        Gpu("h200", 989.4e12, 494.7e12, 141e9, 4.8e12, 450e9, 50e9),
        Gpu("b200", 2250e12, 1125e12, 180e9, 7.7e12, 900e9, 50e9),
    )
}
"""SXM boards in nodes of eight, with 200 Gbit/s (A100) or 400 Gbit/s adapters."""


def gpu_named(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: there is none; it names the nearest.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu: '{name}' is not known{hint(name, GPUS)}; known: {', '.join(GPUS)}")
    return found
