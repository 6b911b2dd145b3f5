"""Finding and reading a user's files, with one clear line for everything that can go wrong."""

from __future__ import annotations

import glob
import json
import os
import time
from pathlib import Path

from core.errors import UserError, hint
from core.hashing import file_digest, stable_hash

Paths = str | list[str]


def expand(paths: Paths) -> list[Path]:
    """The files or folders that paths and globs name, each glob in sorted order.

    Raises:
        UserError: naming the path that matches nothing, and the nearest name beside it.
    """
    found: list[Path] = []
    for item in [paths] if isinstance(paths, str) else paths:
        path = Path(item).expanduser()
        if path.exists():
            found.append(path)
        elif glob.has_magic(item):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise UserError(f"{item}: no file matches this pattern")
            found += [Path(match) for match in matches]
        else:
            raise missing(path)
    if not found:
        raise UserError("no path is given to read data from")
    return found


def missing(path: Path) -> UserError:
    """The error for a path that does not exist: its first missing part and the nearest name."""
    while path.parent != path and not path.parent.exists():
        path = path.parent
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    return UserError(f"{path}: no such file or folder{hint(path.name, siblings)}")


def read_bytes(path: Path) -> bytes:
    """A file's content; raises UserError naming a file that cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def decode(data: bytes, name: str | Path, offset: int = 0) -> str:
    """UTF-8 text; raises UserError naming the byte at fault, counted from the file's start."""
    try:
        return data.decode("utf8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(
            f"{name}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {at}; "
            f"convert the file to UTF-8"
        ) from None


def digest(path: Path, memo: Path | None) -> str:
    """The SHA-256 of a file's bytes, remembered under `memo` by path, size and time of change.

    A file changed within two seconds of being hashed is hashed again next time, since a later
    change could leave the same time behind.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        status = path.stat()
        if memo is None:
            return file_digest(path)
        note = memo / "digests" / f"{stable_hash(str(path.resolve())):016x}.json"
        state = [status.st_size, status.st_mtime_ns]
        try:
            held = json.loads(note.read_text())
            if held["state"] == state and held["noted"] - status.st_mtime > 2:
                return str(held["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no usable note: hash the file
        noted = time.time()
        value = file_digest(path)
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"state": state, "noted": noted, "digest": value}))
        temporary.rename(note)
    except OSError:
        pass  # the note only saves time
    return value
