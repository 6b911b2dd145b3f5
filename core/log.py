"""Logging: one line an event on standard error, the rank in front when there are several."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


def get_logger(name: str = "manyforms") -> logging.Logger:
    """The project's logger; silent until `configure` is called, like any library's."""
    return logging.getLogger(name)


def configure(level: int = logging.INFO, file: Path | None = None) -> None:
    """Send log lines to standard error and, if given, append them to `file`."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    who = f"[rank {rank}] " if world != "1" else ""
    logger = get_logger()
    logger.setLevel(level)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    targets: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        targets.append(logging.FileHandler(file, encoding="utf8"))
    for handler in targets:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
