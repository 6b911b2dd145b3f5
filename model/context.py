"""The context axis: how the tokens of a sample are divided; on one rank they are not.

Where they are, each rank's stream holds its own tokens, while token ids, positions and documents
are whole, in their natural order, on every rank. A branch says what it needs of the others' tokens
(`Need`); the engine binds an implementation of what is below (`parallel/context.py`).

Axes: B batch, T tokens, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from model.attention import Backend, Scores, attend

Need = Literal["tokens", "attention", "gather"]
"""What a branch does where tokens are divided.

tokens: it computes on each token by itself (or reads whole tensors, such as an encoder's output),
    so it is given this rank's tokens.
attention: it is given this rank's tokens too, and lets their queries see all keys by
    `Context.attend`.
gather: it is given all tokens, on every rank, and this rank's are kept of what it returns: right
    for any math, at the memory and the computation of the whole sequence.
"""


_TOLD: dict[Need, str] = {
    "tokens": "computes on each rank's own tokens",
    "attention": "exchanges keys and values, or heads (parallel.cp_method)",
    "gather": "gathers all tokens on every rank, and computes on all of them",
}


def need(slot: str, part: Any) -> Any:
    """What a mixer or feed-forward, or its class, says it needs.

    A feed-forward sees each token by itself unless it says so; any other branch gathers. On a class
    where it depends on options, this is the property that decides.
    """
    return getattr(part, "context", "tokens" if slot == "feedforward" else "gather")


def told(slot: str, part: Any) -> str:
    """The same of a class, in words."""
    said = need(slot, part)
    if isinstance(said, property):
        return "depends on its options: " + (said.__doc__ or "").strip()
    return _TOLD[said]


class Context:
    """One rank: it holds every token. Inside a branch that gathers, every rank is such a one."""

    size: int = 1
    """How many ranks share the tokens of a sample."""

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor with all of them in their natural order."""
        return x

    def whole(self, x: Tensor, dim: int = 1) -> Tensor:
        """All ranks' tokens in their natural order; backward sums the ranks' partial gradients."""
        return x

    def alike(self, x: Tensor, dim: int = 1) -> Tensor:
        """All ranks' tokens of a result; its gradient is alike on every rank and counts once."""
        return x

    def positions(self, x_BTD: Tensor, positions_BT: Tensor | None) -> Tensor | None:
        """The positions of this rank's tokens x, of those of all; None: tokens 0…T−1."""
        return positions_BT

    def attend(
        self,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTK: Tensor,
        scores: Scores,
        backend: Backend = "auto",
    ) -> Tensor:
        """Attention of this rank's queries over every rank's keys and values, as BHTK.

        What `scores` holds is whole: documents, and `position` for a bias, not `bias`.

        Raises:
            UserError: if the backend is not installed or cannot do what is asked.
        """
        return attend(q_BHTK, k_BGTK, v_BGTK, scores, backend)


LOCAL_CONTEXT = Context()
"""The context of a single rank."""
