"""What of Megatron-core needs CUDA, on one GPU, beside the native engine.

    python -m benchmarks.gpu.megatron

Tiny models and a world of one process: this shows that the pieces run and compute the same, not how
they scale. The figure is how far the tensor that is furthest off is from native's, relative to the
norm of that: of every gradient of the last step, and of what the part computes besides.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.rows import Row, attempt, table
from core.errors import UserError
from model.experts import Experts
from model.init import initialise
from model.output import Batch
from model.zoo import build_model
from parallel import megatron_groups
from parallel.config import ParallelConfig
from parallel.engine import Precision, Sums
from parallel.layout import Layout
from parallel.native import NativeEngine
from training.optimizers.adamw import AdamW

STEPS, LR = 3, 1e-3
CONFIG: dict[str, Any] = {
    "kind": "language", "dim": 256, "depth": 2, "vocab": 512, "max_length": 64,
    "tie_embeddings": True,
    "block": {
        "mixer": {"name": "attention", "heads": 4, "kv_heads": 2},
        "feedforward": {"name": "swiglu", "ratio": 2},
    },
}  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def batches(count: int = 2) -> list[Batch]:
    """The micro-batches of one step."""
    noise = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 512, (4, 65), generator=noise)
        found.append({"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()})
    return found


class Loss:
    """Cross-entropy, its count known beforehand."""

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        return {"loss": model(batch).token_losses.sum(), **self.counts(batch)}

    def counts(self, batch: Batch) -> Sums:
        samples, tokens = batch["targets"].shape
        return {"count": torch.tensor(float(samples * tokens)), "samples": torch.tensor(samples)}


def engine(spec: Any, precision: Precision = "fp32") -> NativeEngine:
    """An engine of one process, the model prepared."""
    config = ParallelConfig(engine=spec)
    made: NativeEngine = config.engine.build(layout=Layout(), device=device(), config=config)
    with torch.device("meta"):
        model = build_model(CONFIG)
    made.prepare(model, seed=0, precision=precision)
    made.model.train()
    return made


def trained(spec: Any, precision: Precision = "fp32") -> tuple[dict[str, Tensor], float]:
    """Parameters and gradients after steps of the trainer's AdamW; seconds of the last step."""
    made = engine(spec, precision)
    optimizer = AdamW(made.model, lr=LR, weight_decay=0.0)
    seconds, found = 0.0, {}
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        made.forward_backward(batches(), Loss())
        found = {f"gradient of {name}": g.clone() for name, g in gradients(made.model)}
        optimizer.step(1.0)
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    return found | {name: p.detach().clone() for name, p in made.model.named_parameters()}, seconds


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def apart(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The distance of the tensor that is furthest off, relative to what it should be."""
    assert got.keys() == wanted.keys()
    return max(
        float((got[name].double() - value.double()).norm() / value.double().norm())
        for name, value in wanted.items()
    )


def judged(name: str, error: float, limit: float, note: str) -> Row:
    return Row(name, "ok" if error < limit else "failed", error, f"relative (< {limit:g})", note)


def layers(precision: Precision, limit: float) -> Row:
    """Megatron's layers, embedding and loss against our leaves."""
    wanted, native = trained("native", precision)
    got, seconds = trained("megatron", precision)
    times = f"{1e3 * seconds:.1f} ms a step, native {1e3 * native:.1f}"
    return judged(f"layers and loss, {precision}", apart(got, wanted), limit, times)


def ddp() -> Row:
    """Its DDP: fp32 buckets, reduced during the backward pass."""
    wanted, native = trained("native")
    got, seconds = trained({"name": "megatron", "ddp": True})
    times = f"{1e3 * seconds:.1f} ms a step, native {1e3 * native:.1f}"
    return judged("DDP with overlap", apart(got, wanted), 1e-4, times)


def wrapped(model: nn.Module, distributed_optimizer: bool) -> Any:
    """Megatron's DDP around a model whose parameters are plain; it sums gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=distributed_optimizer,
    )
    return DistributedDataParallel(transformer_config(), settings, model)


def transformer_config(**options: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 4}
    return TransformerConfig(**sizes, calculate_per_token_loss=True, **options)


def loss_of(model: nn.Module, batch: Batch, of: int) -> Tensor:
    """A micro-batch's share of the mean loss of a step of `of` micro-batches."""
    moved = {key: value.to(device()) for key, value in batch.items()}
    losses: Tensor = model(moved).token_losses
    return losses.sum() / (losses.numel() * of)


def distributed_optimizer() -> Row:
    """Its distributed optimizer over its DDP, against the trainer's AdamW."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wanted, _ = trained("native")
    made = engine("megatron")
    model = wrapped(made.model, distributed_optimizer=True)
    options = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=0.0,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(options, [model], use_gloo_process_groups=False)
    step = batches()
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        for index, batch in enumerate(step):
            last = index == len(step) - 1
            with model.no_sync() if not last else torch.enable_grad():
                loss_of(made.model, batch, len(step)).backward()
        model.finish_grad_sync()
        done, _, _ = optimizer.step()
        assert done, "the optimizer skipped a step"
    got = {name: p.detach() for name, p in made.model.named_parameters()}
    got |= {f"gradient of {n}": p.main_grad for n, p in made.model.named_parameters()}
    return judged("distributed optimizer", apart(got, wanted), 1e-4, "Adam, one shard")


def dispatcher() -> Row:
    """Its all-to-all token dispatcher around our experts, against our dropless experts."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    experts_count, top_k, width, hidden = 8, 2, 256, 512
    bank = Experts(experts_count, width, hidden, gated=True, activation="silu")
    initialise(bank, 0, {"name": "fan_in"})
    bank.to(device())
    noise = torch.Generator().manual_seed(1)
    x_ND = torch.randn(128, width, generator=noise).to(device()).requires_grad_()
    scores = torch.randn(128, experts_count, generator=noise).to(device()).softmax(-1)
    weights_Nk, chosen_Nk = scores.topk(top_k, dim=-1)
    ours = bank.dropless(x_ND, chosen_Nk, weights_Nk)
    ours.square().sum().backward()
    wanted = {"output": ours.detach(), "input": _taken(x_ND)}
    wanted |= {name: _taken(p) for name, p in bank.named_parameters()}

    options = transformer_config(
        num_moe_experts=experts_count,
        moe_router_topk=top_k,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
    )
    groups = get_default_pg_collection()
    sender = MoEAlltoAllTokenDispatcher(
        experts_count, list(range(experts_count)), options, pg_collection=groups
    )
    probs_NE = torch.zeros_like(scores).scatter(1, chosen_Nk, weights_Nk)
    rows, probs = sender.dispatch_preprocess(x_ND, probs_NE > 0, probs_NE)
    rows, probs = sender.token_dispatch(rows, probs)
    rows, counts, probs = sender.dispatch_postprocess(rows, probs)
    parts, gate = rows.split(counts.tolist()), bank.gate
    assert gate is not None
    made = [
        (torch.nn.functional.silu(x @ gate.weight[e]) * (x @ bank.up.weight[e]))
        @ bank.down.weight[e]
        for e, x in enumerate(parts)
    ]
    y = torch.cat(made) * probs[:, None]
    theirs = sender.combine_postprocess(sender.token_combine(sender.combine_preprocess(y)))
    theirs.square().sum().backward()
    got = {"output": theirs.detach(), "input": _taken(x_ND)}
    got |= {name: _taken(p) for name, p in bank.named_parameters()}
    note = f"{experts_count} experts, top {top_k}: output and every gradient"
    return judged("MoE dispatcher", apart(got, wanted), 1e-4, note)


def _taken(tensor: Tensor) -> Tensor:
    """A gradient, which is then dropped."""
    gradient, tensor.grad = tensor.grad, None
    assert gradient is not None
    return gradient


class Staged(nn.Module):
    """A model as Megatron's schedules want it."""

    def __init__(self, model: nn.Module, config: Any):
        from megatron.core.enums import ModelType

        super().__init__()
        self.inner, self.config, self.model_type = model, config, ModelType.encoder_or_decoder

    def set_input_tensor(self, tensors: Any) -> None:
        """A first stage reads its batch."""

    def forward(self, batch: Batch) -> Any:
        return self.inner(batch)


def schedule() -> Row:
    """Its forward and backward schedule of one stage over micro-batches, against the engine's."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    native = engine("native")
    native.forward_backward(batches(), Loss())
    wanted = dict(gradients(native.model))
    made, step = engine("megatron"), batches()
    config = transformer_config()
    config.calculate_per_token_loss = False

    def forward(data: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        loss = loss_of(model, next(data), 1)
        return loss, lambda value: (value, {"loss": value.detach()})

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(step),
        model=Staged(made.model, config),
        num_microbatches=len(step),
        seq_length=64,
        micro_batch_size=4,
    )
    got = dict(gradients(made.model))
    note = f"one stage, {len(step)} micro-batches; several stages need several GPUs"
    return judged("schedule", apart(got, wanted), 1e-4, note)


PARTS: dict[str, Callable[[], Row]] = {
    "layers and loss, fp32": lambda: layers("fp32", 1e-4),
    "layers and loss, bf16": lambda: layers("bf16", 5e-2),
    "DDP with overlap": ddp,
    "distributed optimizer": distributed_optimizer,
    "MoE dispatcher": dispatcher,
    "schedule": schedule,
}


def main() -> list[Row]:
    """A row a part; on a machine that cannot run them, one row that says why."""
    if not torch.cuda.is_available():
        return [
            Row("megatron", "refused", note="its dispatcher, schedules and optimizer need a GPU")
        ]
    try:
        megatron_groups.require()
    except UserError as error:
        return [Row("megatron", "refused", note=str(error))]
    torch.set_float32_matmul_precision("highest")
    return [attempt(f"megatron: {name}", part) for name, part in PARTS.items()]


if __name__ == "__main__":
    found = main()
    print(table(found))
    sys.exit(any(row.status == "failed" for row in found))
