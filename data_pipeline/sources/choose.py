"""Which source reads a path: `data.sources=/path/to/file.txt` without naming one."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".pgm", ".ppm"}


def looks_like_path(text: str) -> bool:
    """True where a string cannot be a source's name."""
    return os.sep in text or "." in text or glob.has_magic(text) or Path(text).exists()


def from_path(text: str) -> dict[str, Any]:
    """The source for a path, by its extension, and for a folder by what it holds.

    `.jsonl` and `.ndjson` are JSON lines; `.tar` is a webdataset shard; `.tar.gz` and `.tgz` are
    a packed image folder; everything else is text.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return {"name": _of_folder(path), "path": _inside(path, text)}
    if text.endswith((".tar.gz", ".tgz")):
        return {"name": "image_folder", "path": text}
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".tar": "webdataset"}
    return {"name": kinds.get(path.suffix.lower(), "text"), "path": text}


def _of_folder(folder: Path) -> str:
    for path in folder.rglob("*"):
        suffix = path.suffix.lower()
        if suffix in IMAGES:
            return "image_folder"
        if suffix == ".tar":
            return "webdataset"
        if suffix in (".jsonl", ".ndjson"):
            return "jsonl"
    return "text"


def _inside(folder: Path, text: str) -> str:
    patterns = {"webdataset": "*.tar", "jsonl": "*.jsonl"}
    pattern = patterns.get(_of_folder(folder))
    return text if pattern is None else str(Path(text) / "**" / pattern)
