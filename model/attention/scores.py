"""What shapes the scores of attention besides q·k. Axes: B batch, H heads, T queries, S keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bias:
    """What a position adds to the scores, for any part of them.

    per_head: [H, …], what it is made of, such as a slope per head; may be trained.
    form: (per_head, queries BT, keys BS) → [B or 1, H, T, S].
    queries, keys: the positions of all queries and of all keys, [B or 1, T] and [B or 1, S].
    """

    per_head: Tensor
    form: Callable[[Tensor, Tensor, Tensor], Tensor]
    queries: Tensor
    keys: Tensor

    def between(self, rows: range, columns: range, per_head: Tensor | None = None) -> Tensor:
        """What is added for these queries and keys, of these heads."""
        return self.form(
            self.per_head if per_head is None else per_head,
            self.queries[:, rows.start : rows.stop],
            self.keys[:, columns.start : columns.stop],
        )


@dataclass
class Scores:
    """What shapes the scores besides q·k.

    causal: query t sees keys up to t.
    first: which of the keys the first query is; None: the keys end where the queries end.
    window: how many of the latest keys a query sees, itself among them; None for all.
    documents, key_documents: a query sees keys of its own document only; the second are those of
        the keys, where they are not the queries' own. A query that sees no key gets zeros.
    bias: added to the scores, [B or 1, H, T, S].
    position: a bias that is made from positions, where it is needed; not beside `bias`.
    scale: multiplies q·k; 1/sqrt(K) if None.
    softcap: scores become c·tanh(score/c).
    scratch: where masks may be kept for the next layer of the same forward.
    """

    causal: bool = False
    first: int | None = None
    window: int | None = None
    documents: Tensor | None = None
    key_documents: Tensor | None = None
    bias: Tensor | None = None
    position: Bias | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    scratch: dict[str, Any] = field(default_factory=dict)

    def made(self) -> Scores:
        """The same with the position's bias made, for all queries and keys."""
        if self.position is None:
            return self
        at = self.position
        bias = at.between(range(at.queries.shape[1]), range(at.keys.shape[1]))
        return replace(self, bias=bias, position=None)

    @property
    def plain(self) -> bool:
        """Whether nothing but causality restricts or biases the scores."""
        return self.window is None and self.documents is None and self.bias is None

    def sees(self, rows: range, columns: range) -> bool:
        """False if none of these queries sees any of these keys; both count over all tokens.

        The documents are those of all tokens, and queries and keys are the same tokens.
        """
        nearest = max(rows.start - columns[-1], columns.start - rows[-1], 0)
        if self.causal and rows[-1] < columns.start:
            return False
        if self.window is not None and nearest >= self.window:
            return False
        if self.documents is None:
            return True
        key = f"sees:{rows}:{columns}"
        if key not in self.scratch:
            if "documents on the host" not in self.scratch:
                self.scratch["documents on the host"] = self.documents.cpu()
            ids: Tensor = self.scratch["documents on the host"]
            ids_BT, ids_BS = ids[:, rows.start : rows.stop], ids[:, columns.start : columns.stop]
            apart_B = (ids_BT.amax(1) < ids_BS.amin(1)) | (ids_BT.amin(1) > ids_BS.amax(1))
            self.scratch[key] = not bool(apart_B.all())
        return bool(self.scratch[key])

    def between(self, rows: range, columns: range, device: torch.device) -> Tensor | None:
        """True where one of these queries sees one of these keys, as in `sees`; None: all do."""
        seen: Tensor | None = None
        near = self.window is None or (
            max(rows[-1] - columns.start, columns[-1] - rows.start) < self.window
        )
        if not near or (self.causal and rows.start < columns[-1]):
            at_T = torch.arange(rows.start, rows.stop, device=device)
            at_S = torch.arange(columns.start, columns.stop, device=device)
            distance_TS = at_T[:, None] - at_S
            seen = distance_TS >= 0 if self.causal else distance_TS == distance_TS
            if self.window is not None:
                seen = seen & (distance_TS.abs() < self.window)
        if self.documents is not None:
            ids_BT = self.documents[:, rows.start : rows.stop]
            ids_BS = self.documents[:, columns.start : columns.stop]
            same = (ids_BT[:, :, None] == ids_BS[:, None, :])[:, None]
            seen = same if seen is None else seen & same
        return seen

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """True where a query sees a key, [B or 1, 1, T, S]; None where all see all."""
        packed = (self.documents is not None, self.key_documents is not None)
        key = f"mask:{queries}:{keys}:{self.causal}:{self.first}:{self.window}:{packed}"
        if key not in self.scratch:
            self.scratch[key] = self._mask(queries, keys, device)
        held: Tensor | None = self.scratch[key]
        return held

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        seen: Tensor | None = None
        first = keys - queries if self.first is None else self.first
        distance_TS = (
            torch.arange(first, first + queries, device=device)[:, None]
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
