"""The manifest: what a checkpoint consists of, and how to tell that it still does.

`manifest.json` is written last, so a folder without one was never finished. It carries the size
and SHA-256 of every other file, the name, shape and dtype of every tensor, and a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from core.hashing import file_digest

MANIFEST = "manifest.json"
FORMAT = 1


class FileRecord(BaseModel):
    """One file of a checkpoint: its size in bytes and its SHA-256 in hexadecimal."""

    model_config = ConfigDict(frozen=True)
    size: int
    sha256: str


class TensorRecord(BaseModel):
    """One tensor of a checkpoint: its full shape, whatever the sharding, and its dtype's name."""

    model_config = ConfigDict(frozen=True)
    shape: tuple[int, ...]
    dtype: str


class Manifest(BaseModel):
    """What a checkpoint consists of."""

    model_config = ConfigDict(frozen=True)
    format: int
    step: int
    sequence: int
    """How many saves of this run came before; tells the newest after a return to an older step."""
    saved_at: float
    """When it was saved, in seconds since 1970."""
    ranks: int
    """How many processes wrote it."""
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    versions: dict[str, str]
    extra: dict[str, Any] = {}
    """What the caller wanted to be kept with it, such as the config's digest."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(record.size for record in self.files.values())

    def write_text(self) -> str:
        """The manifest as JSON, with its own digest."""
        body = self.model_dump(mode="json")
        return json.dumps({**body, "digest": _digest(body)}, indent=1, sort_keys=True) + "\n"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class DamagedError(Exception):
    """A checkpoint that is not what its manifest says; the message is the reason."""


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        DamagedError: there is none, it was altered, or a newer version wrote it.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("digest", None)
        if isinstance(body.get("format"), int) and body["format"] > FORMAT:
            raise DamagedError(
                f"its format is {body['format']} and this version reads up to {FORMAT}; update"
            )
        if digest != _digest(body):
            raise DamagedError(f"{MANIFEST} is damaged: its digest does not match")
        return Manifest.model_validate(body)
    except FileNotFoundError:
        raise DamagedError(f"no {MANIFEST}") from None
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, ValidationError):
        raise DamagedError(f"{MANIFEST} is damaged: not a manifest") from None


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of files in `folder`."""
    return {
        name: FileRecord(size=(folder / name).stat().st_size, sha256=file_digest(folder / name))
        for name in names
    }


def flaw(
    folder: Path, manifest: Manifest, *, bytes_too: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """The first thing wrong with a checkpoint's files, or None.

    Args:
        folder: the checkpoint.
        manifest: what `read` made of its manifest.
        bytes_too: read every file and compare its SHA-256, not only its size.
        share: (rank, size): compare only the rank's share of the bytes, so that many ranks verify
            a large checkpoint together.
    """
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != record.size:
            return f"{name} has {size:,} bytes instead of {record.size:,}"
    if not bytes_too:
        return None
    rank, ranks = share
    mine = sorted(manifest.files)[rank::ranks]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return next(filter(None, pool.map(lambda n: _altered(folder, n, manifest), mine)), None)


def _altered(folder: Path, name: str, manifest: Manifest) -> str | None:
    try:
        digest = file_digest(folder / name)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if digest == manifest.files[name].sha256 else f"{name} is damaged: SHA-256 differs"
