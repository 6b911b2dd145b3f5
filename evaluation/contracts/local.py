"""The proofs on one process. Each returns nothing and raises AssertionError with what was seen.

Axes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evaluation.contracts.probe import Probe, total_loss
from model.output import Batch, ModelOutput
from model.roles import roles


def _gradients(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = total_loss(model(batch), batch)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def shapes(probe: Probe) -> None:
    """The losses have a value per target, the logits a row per token or image, in float32."""
    model, batch = probe.model(), probe.batch()
    losses = model(batch).token_losses
    assert losses.shape == batch["targets"].shape, f"losses {tuple(losses.shape)}"
    assert losses.dtype == torch.float32, f"losses are {losses.dtype}"
    asked = {key: value for key, value in batch.items() if key != "targets"}
    logits = model(asked).logits
    width = probe.config.get("vocab", probe.config.get("classes"))
    assert logits.shape == (*batch["targets"].shape, width), f"logits {tuple(logits.shape)}"
    assert torch.isfinite(logits).all(), "logits are not finite"


def bfloat16(probe: Probe) -> None:
    """Under bfloat16 autocast the loss is finite and near the float32 loss."""
    model, batch = probe.model(), probe.batch()
    exact = total_loss(model(batch), batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = total_loss(model(batch), batch)
    assert torch.isfinite(rough), "the loss is not finite"
    assert abs(rough - exact) < 0.05 * abs(exact), f"bfloat16 {rough:.4f}, float32 {exact:.4f}"


def odd_length(probe: Probe) -> None:
    """A prime length works, and a shorter sequence gives the first losses of a longer one."""
    model = probe.model()
    batch = probe.batch(length=23)
    losses = model(batch).token_losses
    assert torch.isfinite(losses).all(), "losses are not finite at 23 tokens"
    if probe.causal:
        short = {key: value[:, :13] for key, value in batch.items()}
        change = (model(short).token_losses - losses[:, :13]).abs().max()
        assert change < 1e-4, f"the first 13 tokens' losses move by {change:.2e} with more behind"


def causality(probe: Probe) -> None:
    """Changing token t changes no logit before t, and some logit from t on; for every t."""
    model = probe.model().eval()
    batch = {key: value[:1] for key, value in probe.batch().items() if key != "targets"}
    batch["documents"] = torch.zeros_like(batch["tokens"])
    batch.pop("positions", None)
    with torch.no_grad():
        before = model(batch).logits
        for at in range(batch["tokens"].shape[1]):
            tokens = batch["tokens"].clone()
            tokens[0, at] = (tokens[0, at] + 1) % probe.config["vocab"]
            moved = (model({**batch, "tokens": tokens}).logits - before).abs().amax((0, 2))
            assert not at or moved[:at].max() < 1e-6, f"token {at} moves an earlier logit"
            assert moved[at:].max() > 1e-6, f"token {at} moves nothing"


def documents(probe: Probe) -> None:
    """Packed documents do not see each other: changing the second leaves the first alone."""
    model, batch = probe.model().eval(), probe.batch()
    second = batch["documents"].bool()
    tokens = torch.where(second, (batch["tokens"] + 1) % probe.config["vocab"], batch["tokens"])
    asked = {key: value for key, value in batch.items() if key != "targets"}
    with torch.no_grad():
        moved = (model({**asked, "tokens": tokens}).logits - model(asked).logits).abs().amax(-1)
    assert moved[~second].max() < 1e-6, "the second document moves the first one's logits"
    assert moved[second].max() > 1e-6, "the second document moves nothing"


def gradients(probe: Probe) -> None:
    """Every trainable parameter receives a finite gradient that is not zero."""
    model, batch = probe.model(), probe.batch(size=8)
    loss, found = _gradients(model, batch)
    assert torch.isfinite(loss), "the loss is not finite"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert name in found, f"{name} receives no gradient"
        assert torch.isfinite(found[name]).all(), f"{name}: gradient is not finite"
        assert found[name].abs().max() > 0, f"{name}: gradient is zero"


def finite_difference(probe: Probe) -> None:
    """In float64 the gradient along a random direction is the loss's central difference."""
    model, batch = probe.model().double(), probe.batch(size=2)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    _, found = _gradients(model, batch)
    generator = torch.Generator().manual_seed(7)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in parameters.items()
    }
    slope = sum((found[name] * direction[name]).sum() for name in found)
    values = []
    step = 1e-6
    with torch.no_grad():
        for sign in (1, -1):
            for name, way in direction.items():
                parameters[name].add_(way, alpha=sign * step)
            values.append(total_loss(model(batch), batch))
            for name, way in direction.items():
                parameters[name].sub_(way, alpha=sign * step)
    measured = (values[0] - values[1]) / (2 * step)
    error = abs(measured - slope) / max(abs(float(slope)), 1e-3)
    assert error < 1e-3, f"gradient {float(slope):.6f}, central difference {float(measured):.6f}"


def compiled(probe: Probe, backend: str = "aot_eager") -> None:
    """torch.compile gives the same loss and gradients."""
    model, batch = probe.model(), probe.batch()
    loss, found = _gradients(model, batch)
    torch._dynamo.reset()
    again: Callable[[Batch], ModelOutput] = torch.compile(model, backend=backend)
    model.zero_grad()
    fast = total_loss(again(batch), batch)
    fast.backward()
    error = float((fast.detach() - loss).abs())
    assert error < 1e-5 * max(1.0, float(loss)), f"eager {loss:.7f}, compiled {fast:.7f}"
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.grad is not None, f"{name}: no gradient when compiled"
            error = float((parameter.grad - found[name]).abs().max() / found[name].abs().max())
            assert error < 1e-4, f"{name}: gradient differs by {error:.1e} when compiled"


def counts(probe: Probe) -> None:
    """Every parameter has a role, and the role arithmetic gives PyTorch's own FLOP count."""
    from model.accounting import count

    model, batch = probe.model(), probe.batch()
    known = roles(model)
    assert set(known) == {name for name, _ in model.named_parameters()}
    counted = count(model, batch)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.parameters == total, f"{counted.parameters} by roles, {total} in the model"
    # The fused attention of CPUs is not in PyTorch's table; written out it is matrix products.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as meter, torch.no_grad():
        model(batch)
    measured = meter.get_total_flops()
    assert counted.forward_flops == measured or not probe_counts_exactly(probe), (
        f"{counted.forward_flops} FLOPs by roles, {measured} by PyTorch's counter"
    )


def probe_counts_exactly(probe: Probe) -> bool:
    """Whether PyTorch's counter sees exactly the operations that roles count.

    It sees matrix products and convolutions only; a data-dependent sparse product is counted by
    what the batch happened to route, which roles know on average.
    """
    return "flops" not in probe.entry.cannot


def repeatable(probe: Probe) -> None:
    """The same seed gives the same model and the same loss, bit for bit; another seed another."""
    batch = probe.batch()
    first, again, other = (
        total_loss(m(batch), batch) for m in (probe.model(3), probe.model(3), probe.model(4))
    )
    assert torch.equal(first, again), "two runs of one seed differ"
    assert not torch.equal(first, other), "another seed changes nothing"


PROOFS: dict[str, Callable[[Probe], None]] = {
    "shapes": shapes,
    "bfloat16": bfloat16,
    "gradients": gradients,
    "difference": finite_difference,
    "odd_length": odd_length,
    "causal": causality,
    "documents": documents,
    "compile": compiled,
    "counts": counts,
    "repeatable": repeatable,
}
"""Name of each contract → its proof."""


def applies(contract: str, probe: Probe) -> bool:
    """Whether a contract says anything about this probe's kind of model."""
    if contract in ("causal", "documents"):
        return probe.causal
    if contract == "odd_length":
        return bool(probe.config["kind"] == "language")
    return True
