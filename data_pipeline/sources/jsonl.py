"""JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from core.errors import UserError, hint
from core.registry import register
from data_pipeline.files import Paths, decode, digest, expand
from data_pipeline.sources.base import Document


@register("source", "jsonl", title="JSON lines")
class JsonLines:
    """Files with a JSON object on each line, a document per line; blank lines are skipped.

    Args:
        path: a file, a glob, or a list of these.
        field: the key of the object that holds the text.
    """

    def __init__(self, cache: Path | None = None, *, path: Paths, field: str = "text"):
        self.cache = cache
        self.path = path
        self.field = field

    def fingerprint(self) -> str:
        whole = hashlib.sha256(self.field.encode())
        for file in expand(self.path):
            whole.update(digest(file, self.cache).encode())
        return whole.hexdigest()

    def documents(self) -> Iterator[Document]:
        for path in expand(self.path):
            try:
                with open(path, "rb") as file:
                    yield from self._lines(path, file)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None

    def _lines(self, path: Path, file: Iterator[bytes]) -> Iterator[Document]:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}:{number}"
                yield Document(place, text_field(decode(line, path, offset), self.field, place))
            offset += len(line)


def text_field(line: str, field: str, place: str) -> str:
    """The text under a key of a JSON object; raises UserError naming `place` when it has none."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: each line is a JSON object, this one is not")
    if field not in value:
        raise UserError(f"{place}: no field '{field}'{hint(field, value)}")
    text = value[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field '{field}' is not a string")
    try:
        text.encode("utf8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field '{field}' has half of a surrogate pair at character {error.start}"
        ) from None
    return text
