"""Activations: elementwise functions, by name."""

from core.registry import export

export(__name__, globals())
