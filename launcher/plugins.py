"""Mechanisms from outside the project: a user's files, and what installed packages offer."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from core.config import Source
from core.errors import UserError
from core.registry import load_plugin

ENTRY_POINTS = "manyforms.mechanisms"
"""The entry-point group under which installed packages offer mechanisms."""


def load_installed_mechanisms() -> None:
    """Load the mechanisms that installed packages offer through entry points."""
    for point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"entry point {point.name} ({point.value}) of {ENTRY_POINTS}: "
                f"{type(error).__name__}: {error}"
            ) from error


def load_plugins(data: dict[str, Any], source: Source, folder: Path) -> None:
    """Load entry points and plugins; file names become absolute, in place."""
    load_installed_mechanisms()
    plugins = data.get("plugins") or []
    if isinstance(plugins, str):
        plugins = [plugins]
    if not isinstance(plugins, list) or not all(isinstance(item, str) for item in plugins):
        return  # the config check says it better
    found = []
    for index, item in enumerate(plugins):
        if item.endswith(".py"):
            on_command_line = source.locate(("plugins", index)) == "command line"
            base = Path() if on_command_line else folder
            item = str((base / item).resolve())
        try:
            load_plugin(item)
        except UserError as error:
            raise UserError(f"{source.locate(('plugins', index))}: {error}") from None
        found.append(item)
    data["plugins"] = found
