"""Where samples come from, by name. A source of text has documents, one of images has images."""

from core.registry import export

export(__name__, globals())
