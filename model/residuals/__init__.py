"""Residual topologies: what a branch reads from the stream and how its output joins it."""

from core.registry import export

export(__name__, globals())
