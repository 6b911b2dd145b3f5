"""Placements: where a block's norms stand around its branches."""

from core.registry import export

export(__name__, globals())
