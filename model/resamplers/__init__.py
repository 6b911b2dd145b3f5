"""Resamplers: between the stages of a hierarchical vision model."""

from core.registry import export

export(__name__, globals())
