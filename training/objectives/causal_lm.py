"""Next-token prediction.

Axes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from core.registry import register
from model.leaves import IGNORE
from model.output import Batch
from training.objectives.base import Objective, Sums, common


@register("objective", "causal_lm")
class CausalLM(Objective):
    """The negative log-likelihood of every next token.

    With a tokenizer, held-out evaluation also reports bits per byte: the loss in bits over the
    UTF-8 bytes that the predicted tokens stand for, which compares across tokenizers.
    """

    kind: ClassVar[Literal["language", "vision"]] = "language"

    def __init__(self, tokenizer: Any = None):
        self.bytes_V: Tensor | None = None
        if tokenizer is not None:
            self.bytes_V = torch.tensor(tokenizer.token_bytes(), dtype=torch.float32)

    def __call__(self, model: nn.Module, batch: Batch) -> Sums:
        targets_BT = batch["targets"]
        output = model(batch)
        sums = common(self, output, batch)
        sums["loss"] = output.token_losses.sum()
        if self.bytes_V is not None and not torch.is_grad_enabled():
            self.bytes_V = self.bytes_V.to(targets_BT.device)
            # Ids beyond the tokenizer's, in a vocabulary rounded up, stand for no text.
            known_BT = (targets_BT != IGNORE) & (targets_BT < len(self.bytes_V))
            sums["bytes"] = self.bytes_V[targets_BT.where(known_BT, 0)].where(known_BT, 0.0).sum()
        return sums

    def report(self, totals: dict[str, float]) -> dict[str, float]:
        report = super().report(totals)
        if totals.get("bytes"):
            report["bits_per_byte"] = totals["loss"] / math.log(2) / totals["bytes"]
        return report
