"""From a config to data."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from data_pipeline.cache import default_cache
from data_pipeline.config import DataConfig
from data_pipeline.data import Data
from data_pipeline.language import open_language
from data_pipeline.vision import open_vision

__all__ = ["Data", "open_data"]


def open_data(config: DataConfig, kind: str, seed: int, cache: Path | None = None) -> Data:
    """Open data for training.

    Args:
        config: the `data` section.
        kind: "language" or "vision".
        seed: of random windows and augmentations; not of the split.
        cache: where tokenizers, tokens and decoded images are kept; None: the user's cache.

    Raises:
        UserError: for data that is missing, empty, unreadable or too short.
    """
    cache = default_cache() if cache is None else cache
    if kind == "language":
        return open_language(config, seed, cache)
    if kind == "vision":
        return open_vision(config, seed, cache)
    raise UserError(f"data has no kind '{kind}'; valid: language, vision")
