"""Optimizers: they read roles and work on each rank's own shard of every parameter."""

from core.registry import export

export(__name__, globals())
