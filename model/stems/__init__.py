"""Stems: from an image BCHW to tokens BTD and their grid."""

from core.registry import export

export(__name__, globals())
