"""A cache of folders, each built once under a key that names everything it was made from.

An entry is written to a temporary folder beside its place, described by a manifest of sizes and
checksums, and renamed into place, so that a reader sees all of it or none of it. Processes that
want the same entry at the same time wait for one of them to build it. An entry that does not
match its manifest is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from core.errors import UserError
from core.hashing import stable_hash
from core.log import get_logger

MANIFEST = "manifest.json"
_WHOLE = 64 * 2**20  # files up to this size are checksummed whole
_BLOCK = 2**20


def default_cache() -> Path:
    """`$MANYFORMS_CACHE`, or `manyforms` in the user's cache folder."""
    chosen = os.environ.get("MANYFORMS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "manyforms"


def key(*parts: int | str | bytes) -> str:
    """A short name for what an entry was made from."""
    return f"{stable_hash(*parts):016x}"


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, holding what `build(temporary folder)` wrote.

    Raises:
        UserError: if the cache cannot be written.
    """
    if _fault(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            fault = _fault(folder)
            if fault is None:  # another process built it while this one waited
                return folder
            if folder.exists():
                get_logger().warning("cache %s: %s; building it again", folder, fault)
            temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
            try:
                build(temporary)
                _seal(temporary)
                _swap(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cache {folder}: cannot be written: {error.strerror or error}") from None
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the file system can lock; else renames still keep
    entries whole, and the work is merely done twice."""
    import fcntl

    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _swap(temporary: Path, folder: Path) -> None:
    """Move a finished entry into place, replacing a broken one; a reader's open maps stay valid."""
    if folder.exists():
        broken = Path(tempfile.mkdtemp(prefix=folder.name + ".broken.", dir=folder.parent))
        folder.rename(broken / "entry")
        shutil.rmtree(broken, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if _fault(folder) is not None:  # not merely another process that was first
            raise


def _seal(folder: Path) -> None:
    files = sorted(p.name for p in folder.iterdir())
    manifest = {name: [(folder / name).stat().st_size, _checksum(folder / name)] for name in files}
    for name in files:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    folder.chmod(0o755)  # temporary folders are private; a cache may be shared


def _fault(folder: Path) -> str | None:
    """What is wrong with an entry, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, (size, checksum) in manifest.items():
            file = folder / name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes and should have {size}"
            if _checksum(file) != checksum:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"the manifest cannot be read ({type(error).__name__})"
    return None


def _checksum(path: Path) -> str:
    """SHA-256 of the file, or of 64 evenly spread MiB of a large one, so that opening is fast."""
    size = path.stat().st_size
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for part in range(64):
            file.seek((size - _BLOCK) * part // 63)
            hasher.update(file.read(_BLOCK))
    return hasher.hexdigest()
