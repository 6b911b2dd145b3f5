"""Published models, by name, at their published sizes."""

from core.registry import export

export(__name__, globals())
