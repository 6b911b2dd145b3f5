"""What every model returns. Axes: B batch, T tokens, V vocabulary or classes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from model.stream import Stream

Batch = dict[str, Tensor]


@dataclass
class ModelOutput:
    """token_losses: nats per target, BT or B, 0 where not counted; None without targets.

    logits: BTV or BV; None when the losses were asked for and the logits were not kept.
    losses: auxiliary losses of shape B, weighted, by name.
    metrics: detached values to log.
    stream: the stream after the last norm.
    """

    token_losses: Tensor | None
    logits: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    stream: Stream | None = None
