"""Mixers: what lets tokens see each other; f(x_BTD, stream) → y_BTD inside the region."""

from core.registry import export

export(__name__, globals())
