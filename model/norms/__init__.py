"""Normalisations: x BTD → BTD, outside the region."""

from core.registry import export

export(__name__, globals())
