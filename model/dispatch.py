"""Tokens on their way to experts that other ranks may hold; on one rank they stay where they are.

An engine whose expert axis is split binds its own subclass (`parallel/expert.py`).

Axes: P assignments of tokens to experts, D width, E experts.
"""

from __future__ import annotations


class Dispatch:
    """One rank: it holds every expert."""

    size: int = 1
    """How many ranks share the expert axis."""


LOCAL_DISPATCH = Dispatch()
"""The dispatch of a single rank."""
