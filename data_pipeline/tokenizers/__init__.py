"""Tokenizers by name: bytes, characters, SentencePiece."""

from core.registry import export

export(__name__, globals())
