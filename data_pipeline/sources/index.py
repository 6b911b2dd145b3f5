"""An index of a tar shard: where every member's bytes are, so that samples are random-access.

A tar file has no table of contents, so it is walked once, header by header; the index is then
remembered under the shard's size and time of change.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.hashing import stable_hash

_BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One file inside a shard: `data` of `size` bytes from `offset`."""

    name: str
    offset: int
    size: int


def index_shard(path: Path, memo: Path | None) -> list[Member]:
    """Every regular file of a tar shard, in order.

    Raises:
        UserError: naming the shard and the offset where it is truncated or corrupt.
    """
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns]
    if memo is None:
        return _walk(path, status.st_size)
    note = memo / "shards" / f"{stable_hash(str(path.resolve())):016x}.json"
    try:
        held = json.loads(note.read_text())
        if held["state"] == state:
            return [Member(*member) for member in held["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no usable note: walk the shard
    members = _walk(path, status.st_size)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}.tmp")
        rows = [[m.name, m.offset, m.size] for m in members]
        temporary.write_text(json.dumps({"state": state, "members": rows}))
        temporary.rename(note)
    except OSError:
        pass  # the note only saves time
    return members


def _walk(path: Path, size: int) -> list[Member]:
    members: list[Member] = []
    end = 0
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > size:
                        raise _truncated(path, member.offset, member.name)
                    if member.isfile():
                        members.append(Member(member.name, member.offset_data, member.size))
                    end = tar.offset
        except tarfile.TarError as error:
            if end == 0:
                raise UserError(f"shard {path}: offset 0: not a tar file: {error}") from None
            raise _truncated(path, end, None) from None
        # A whole archive ends in two blocks of zeros. The walk also stops, without a word, where
        # the file ends early or a header is broken.
        file.seek(end)
        last = file.read(2 * _BLOCK)
    if len(last) < 2 * _BLOCK:
        raise _truncated(path, end + len(last), None)
    if any(last):
        raise UserError(
            f"shard {path}: corrupt at offset {end}: no valid tar header there; write the shard "
            f"again"
        )
    return members


def _truncated(path: Path, offset: int, member: str | None) -> UserError:
    where = "" if member is None else f" inside {member}"
    return UserError(f"shard {path}: truncated at offset {offset}{where}; write the shard again")
