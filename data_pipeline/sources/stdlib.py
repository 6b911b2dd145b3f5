"""Python's own standard library: real text that is on every machine."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field

from core.errors import UserError
from core.registry import register
from data_pipeline.files import decode, read_bytes
from data_pipeline.sources.base import Document

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@register("source", "python_stdlib", title="the running interpreter's standard library")
class PythonStdlib:
    """The source text of the standard library's modules, in sorted order, a document per file.

    Test packages and installed packages are left out.

    Args:
        max_megabytes: stop before the file that would exceed this many megabytes; None reads all.
    """

    def __init__(self, *, max_megabytes: Annotated[float, Field(gt=0)] | None = None):
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.max_bytes = None if max_megabytes is None else int(max_megabytes * 1e6)

    @cached_property
    def files(self) -> list[Path]:
        """The modules within the size cap, sorted by their path below the library's folder."""
        found = [
            path.relative_to(self.root)
            for path in self.root.rglob("*.py")
            if not _SKIPPED & set(path.relative_to(self.root).parts)
        ]
        total, kept = 0, []
        for path in sorted(found, key=lambda p: p.as_posix()):
            total += (self.root / path).stat().st_size
            if self.max_bytes is not None and total > self.max_bytes:
                break
            kept.append(path)
        if not kept:
            raise UserError(
                f"python_stdlib: no source file under {self.root} within max_megabytes; raise it, "
                f"or name another source"
            )
        return kept

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            body = read_bytes(self.root / path)
            digest.update(f"{path.as_posix()}:{len(body)}:".encode() + body)
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            yield Document(path.as_posix(), decode(read_bytes(self.root / path), self.root / path))
