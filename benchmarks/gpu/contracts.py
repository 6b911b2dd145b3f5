"""Every mechanism on a GPU against itself on the CPU: losses and every gradient.

In float32 (TF32 off) both differ by the order of sums; under bfloat16 autocast by its rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.rows import Row
from core.registry import Entry
from evaluation.contracts.probe import Probe, mechanisms, probe, total_loss

FLOAT32, BFLOAT16 = 1e-4, 5e-2
"""Largest differences: of a loss relative to it, and in float32 of a gradient relative to its own
largest entry, or a hundredth of the model's."""


def run(
    subject: Probe, device: torch.device, bf16: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """The probe's loss and gradients, computed on a device, given on the CPU."""
    model = subject.model().to(device)
    batch = {name: value.to(device) for name, value in subject.batch().items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = total_loss(model(batch), batch)
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def apart(entry: Entry, device: torch.device) -> tuple[float, float]:
    """How far float32 and bfloat16 on the device are from float32 on the CPU."""
    subject = probe(entry)
    loss, gradients = run(subject, torch.device("cpu"))
    there, theirs = run(subject, device)
    assert theirs.keys() == gradients.keys(), "other parameters receive gradients"
    floor = 1e-2 * max(float(g.abs().max()) for g in gradients.values())
    worst = max(
        float((theirs[name] - g).abs().max()) / max(float(g.abs().max()), floor)
        for name, g in gradients.items()
    )
    rough, _ = run(subject, device, bf16=True)
    return max(worst, abs(there - loss) / abs(loss)), abs(rough - loss) / abs(loss)


def judge(found: dict[str, tuple[float, float] | str]) -> list[Row]:
    """A row for each type, and one for each mechanism that is off or broke."""
    rows: list[Row] = []
    measured = {name: pair for name, pair in found.items() if not isinstance(pair, str)}
    for name, reason in found.items():
        if isinstance(reason, str):
            rows.append(Row(f"contract {name}", "failed", note=reason))
    for index, (kind, limit) in enumerate((("float32", FLOAT32), ("bfloat16", BFLOAT16))):
        over = {name: pair[index] for name, pair in measured.items() if not pair[index] <= limit}
        rows += [
            Row(f"contract {name}, {kind}", "failed", e, "relative") for name, e in over.items()
        ]
        worst = max((pair[index] for pair in measured.values()), default=float("nan"))
        note = f"worst of {len(measured)} mechanisms, limit {limit:g}"
        rows.append(Row(f"contracts, {kind}", "failed" if over else "ok", worst, "relative", note))
    return rows


def main() -> list[Row]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, tuple[float, float] | str] = {}
    for entry in mechanisms():
        name = f"{entry.slot}:{entry.name}"
        try:
            found[name] = apart(entry, device)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return judge(found)
