"""The context axis: how the tokens of a sample are divided; on one rank they are not.

An engine whose context axis is split binds its own subclass (`parallel/context.py`).

Axes: B batch, T tokens.
"""

from __future__ import annotations


class Context:
    """One rank: it holds every token."""

    size: int = 1
    """How many ranks share the context axis."""


LOCAL_CONTEXT = Context()
"""The context of a single rank."""
