"""Text files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from core.errors import UserError
from core.registry import register
from data_pipeline.files import Paths, decode, digest, expand, read_bytes
from data_pipeline.sources.base import Document


@register("source", "text", title="text files")
class Text:
    """UTF-8 text files, a document per file, or several where a separator divides them.

    Args:
        path: a file, a folder (every file below it), a glob, or a list of these.
        separator: a string that stands between documents within a file and belongs to neither.
    """

    def __init__(self, cache: Path | None = None, *, path: Paths, separator: str | None = None):
        if separator == "":
            raise UserError("text: the separator is empty; leave it out for one document a file")
        self.cache = cache
        self.path = path
        self.separator = separator

    @cached_property
    def files(self) -> list[Path]:
        """The files that the path names, each folder's in sorted order."""
        found: list[Path] = []
        for item in expand(self.path):
            if item.is_dir():
                inside = sorted(p for p in item.rglob("*") if p.is_file())
                if not inside:
                    raise UserError(f"{item}: the folder holds no files")
                found += inside
            else:
                found.append(item)
        return found

    def fingerprint(self) -> str:
        whole = hashlib.sha256(repr(self.separator).encode())
        for file in self.files:
            whole.update(digest(file, self.cache).encode())
        return whole.hexdigest()

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            text = decode(read_bytes(file), file)
            parts = [text] if self.separator is None else text.split(self.separator)
            for number, part in enumerate(parts):
                yield Document(f"{file}#{number}" if len(parts) > 1 else str(file), part)
