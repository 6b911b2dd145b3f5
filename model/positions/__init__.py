"""Positions: tables added at the input, rotations of queries and keys, score biases."""

from core.registry import export

export(__name__, globals())
