"""`--layout auto`: every layout that can work, judged by arithmetic; the best few are then built.

The arithmetic is coarse on purpose (bytes of shards, of what a block keeps, of the messages each
axis needs); it only has to leave good layouts in. What is printed comes from building them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from core.errors import UserError
from launcher.config import RunConfig
from launcher.plans.estimate import HEADROOM, members, send_rate
from launcher.plans.even import even_experts
from launcher.plans.fake import empty_batch
from launcher.plans.gpus import Gpu
from launcher.plans.trace import Trace
from model.accounting import count
from model.language import LanguageConfig
from model.leaves import ExpertBank
from model.roles import roles
from model.zoo import build_model
from parallel.bubble import bubble
from parallel.check import check_model
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.recompute import blocks

STATE = 16
"""Bytes for each parameter: it, its gradient and AdamW's two moments, all in float32."""


@dataclass(frozen=True)
class Facts:
    """What the arithmetic needs of a model; bytes are of one sample.

    dense, expert, ends: parameters of the blocks without experts, of experts, outside of blocks.
    kept: bytes that one block keeps for its backward pass; border: of the stream between blocks.
    logits: bytes of one sample's logits. flops: of training on one sample.
    """

    dense: int
    expert: int
    ends: int
    depth: int
    experts: int
    kept: float
    border: float
    logits: float
    flops: float
    tokens: int


@dataclass(frozen=True)
class Candidate:
    """A layout and what the arithmetic says of it: seconds of a step, bytes of a rank."""

    parallel: ParallelConfig
    micro_batch: int
    seconds: float
    memory: float


def facts(config: RunConfig) -> Facts:
    """Read a model, built without memory, and what one of its blocks keeps."""
    with torch.device("meta"):
        model = build_model(config.model)
        batch = empty_batch(config, 1)
    counted = count(model, batch)
    known = roles(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    inside = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if module in set(blocks(model))
        for name, _ in module.named_parameters()
    }
    expert = sum(size for name, size in sizes.items() if known[name].expert is not None)
    held = sum(size for name, size in sizes.items() if name in inside)
    banks = [module.experts for module in model.modules() if isinstance(module, ExpertBank)]
    depth = len(blocks(model))
    flops = float(counted.training_flops or 0)
    language = isinstance(config.model, LanguageConfig)
    tokens = batch["tokens"].shape[1] if language else _tokens(model)
    width = int(getattr(config.model, "dim", None) or 0) or 1
    vocab = config.model.vocab if isinstance(config.model, LanguageConfig) else 0
    kept = _kept(config, depth)
    return Facts(
        held - expert, expert, sum(sizes.values()) - held, depth, min(banks, default=1), kept,
        4.0 * tokens * width, 12.0 * tokens * (vocab if isinstance(vocab, int) else 0), flops,
        tokens,
    )  # fmt: skip


def _tokens(model: nn.Module) -> int:
    return int(getattr(model, "patches", 1))


def _kept(config: RunConfig, depth: int) -> float:
    """Bytes a block keeps of one sample: what is alive behind a forward pass, shared out."""
    with FakeTensorMode():
        model = build_model(config.model)
        even_experts(model)
        batch = empty_batch(config, 1)
        bf16 = config.train.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), Trace({}) as trace:
            losses = model(batch).token_losses
            alive = trace.live
    del losses
    return alive / depth


def candidates(config: RunConfig, world: int, gpu: Gpu) -> list[Candidate]:
    """Every layout of `world` ranks that the model can run and memory may hold, fastest first."""
    known = facts(config)
    with torch.device("meta"):
        model = build_model(config.model)
    found = [
        judged
        for parallel, micro_batch in _layouts(config, known, world, gpu, model)
        if (judged := _judge(config, known, parallel, micro_batch, world, gpu)) is not None
    ]
    fastest: dict[tuple[int, ...], Candidate] = {}
    for each in sorted(found, key=lambda each: each.seconds):
        # Layouts that only share out the batch in another way would crowd out the others.
        parallel = each.parallel
        fastest.setdefault((parallel.tp, parallel.pp, parallel.cp, parallel.ep), each)
    return list(fastest.values())


def _layouts(
    config: RunConfig, known: Facts, world: int, gpu: Gpu, model: nn.Module
) -> Iterator[tuple[ParallelConfig, int]]:
    batch = config.train.global_batch
    able: dict[tuple[str, int], bool] = {}

    def can(axis: str, size: int) -> bool:
        if size > 1 and (axis, size) not in able:
            try:
                alone = Layout.of(ParallelConfig.model_validate({axis: size}), size)
                check_model(alone, model, recompute=config.train.recompute)
                able[axis, size] = True
            except UserError:
                able[axis, size] = False
        return size == 1 or able[axis, size]

    for tp in _powers(gpu.per_node):
        for pp in (n for n in _powers(32) if n <= known.depth):
            for cp in _powers(16 if known.tokens >= 16384 else 1):
                for ep in (n for n in _powers(256) if known.experts % n == 0):
                    left, rest = divmod(world, tp * pp * cp * ep)
                    fits = not rest and left and batch % (left * ep) == 0
                    sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep}
                    if not fits or not all(can(axis, size) for axis, size in sizes.items()):
                        continue
                    for fsdp in (n for n in _powers(left) if left % n == 0):
                        share = batch // (left * ep)
                        for micro in (n for n in (1, 2, 4, 8) if share % n == 0):
                            if pp > 1 and share // micro < pp:
                                continue
                            yield (
                                config.parallel.replace(
                                    **sizes,
                                    replicate=left // fsdp,
                                    fsdp=fsdp,
                                    sequence_parallel=tp > 1,
                                    reduce_every_micro_batch=share > micro and pp == 1,
                                    schedule=config.parallel.schedule if pp > 1 else "1f1b",
                                ),
                                micro,
                            )


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]


def _judge(
    config: RunConfig, f: Facts, parallel: ParallelConfig, micro: int, world: int, gpu: Gpu
) -> Candidate | None:
    """The arithmetic; None where memory cannot hold it."""
    layout = Layout.of(parallel, world)
    tp, pp, cp, ep = layout.tp, layout.pp, layout.cp, layout.ep
    m = config.train.global_batch // layout.data_size // micro
    bf16 = config.train.precision == "bf16"
    width = 2 if bf16 else 4
    dense, expert = f.dense / (tp * pp), f.expert / (tp * pp * ep)
    ends = f.ends / tp / (2 if pp > 1 else 1)  # the first stage has the table, the last the head
    shards = (dense + ends) / layout.shard + expert / layout.expert_shard
    sharded = layout.shard > 1
    block = (dense + expert) * pp / f.depth
    recompute = config.train.recompute == "block"
    per_stage = f.depth / pp
    scale = micro / (tp * cp)
    flying = min(pp, m)
    kept = f.border * per_stage + f.kept if recompute else f.kept * per_stage
    memory = STATE * shards + kept * flying * scale + f.logits * scale
    if sharded:
        memory += 3 * width * block + width * ends
        if m > 1 and not parallel.reduce_every_micro_batch:
            memory += width * (dense + expert + ends)  # whole gradients until the last micro-batch
    if memory > HEADROOM * gpu.memory:
        return None
    rate = gpu.flops if bf16 else gpu.float32
    idle = bubble(parallel.schedule, pp, parallel.virtual_stages, m) if pp > 1 else 0.0
    passes = 4 / 3 if recompute else 1.0
    seconds = passes * f.flops * config.train.global_batch / world / rate * (1 + idle)
    wires = {"links": 0.0, "network": 0.0}

    def send(axis: str, amount: float) -> None:
        n = len(members(axis, layout))
        if n > 1:
            wire, speed = send_rate(axis, layout, gpu)
            wires[wire] += amount * (n - 1) / n / speed

    stream = f.border * micro / cp * per_stage * m
    send("tp", stream * 8 * (1.5 if recompute else 1.0))
    gathers = m if parallel.reduce_every_micro_batch or pp == 1 else 1
    for axis, amount in (("fsdp×ep×cp", dense + ends), ("fsdp×cp", expert)):
        send(axis, amount * (2 * width * gathers + 4 * (gathers if m > 1 else 1)))
    send("replicate", 8 * shards)
    send("ep", stream / tp * 8)
    send("cp", stream / tp * 2)
    taken = max(seconds, *wires.values()) + 0.1 * sum(wires.values())  # some of it shows
    return Candidate(parallel, micro, taken, memory)
