"""What shapes the scores of attention besides q·k. Axes: B batch, H heads, T queries, S keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Scores:
    """What shapes the scores besides q·k.

    causal: query t sees keys up to t (keys end where the queries end).
    window: how many of the latest keys a query sees, itself among them; None for all.
    documents, key_documents: a query sees keys of its own document only; the second are those of
        the keys, where they are not the queries' own. A query that sees no key gets zeros.
    bias: added to the scores, [B or 1, H, T, S].
    scale: multiplies q·k; 1/sqrt(K) if None.
    softcap: scores become c·tanh(score/c).
    scratch: where masks may be kept for the next layer of the same forward.
    """

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None
    key_documents: Tensor | None = None
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether nothing but causality restricts or biases the scores."""
        return self.window is None and self.documents is None and self.bias is None

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """True where a query sees a key, [B or 1, 1, T, S]; None where all see all."""
        packed = (self.documents is not None, self.key_documents is not None)
        key = f"mask:{queries}:{keys}:{self.causal}:{self.window}:{packed}"
        if key not in self.scratch:
            self.scratch[key] = self._mask(queries, keys, device)
        held: Tensor | None = self.scratch[key]
        return held

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        seen: Tensor | None = None
        distance_TS = (
            torch.arange(keys - queries, keys, device=device)[:, None]
            - torch.arange(keys, device=device)[None, :]
        )
        if self.causal:
            seen = (distance_TS >= 0)[None, None]
        if self.window is not None:
            near = (distance_TS.abs() < self.window)[None, None]
            seen = near if seen is None else seen & near
        if self.documents is not None:
            keys_BS = self.documents if self.key_documents is None else self.key_documents
            same = (self.documents[:, :, None] == keys_BS[:, None, :])[:, None]
            seen = same if seen is None else seen & same
        return seen
