"""Objectives: what is learned, as sums over samples that add up over any layout."""

from core.registry import export

export(__name__, globals())
