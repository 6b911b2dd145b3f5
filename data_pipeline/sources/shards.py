"""WebDataset shards: tar files whose consecutive members of one stem are one sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.registry import register
from data_pipeline.files import Paths, decode, digest, expand
from data_pipeline.sources.base import Document, Pixels
from data_pipeline.sources.choose import IMAGES
from data_pipeline.sources.folder import decode_image
from data_pipeline.sources.index import Member, index_shard
from data_pipeline.sources.jsonl import text_field

CLASS_NAMES = "classes.txt"
_TEXT = ("txt", "json")


@dataclass(frozen=True)
class Sample:
    """The members of one sample, by extension."""

    shard: Path
    stem: str
    members: dict[str, Member]

    def place(self, extension: str) -> str:
        """What error messages call a member."""
        member = self.members[extension]
        return f"shard {self.shard}: {member.name} at offset {member.offset}"

    def bytes(self, extension: str) -> bytes:
        """A member's content."""
        member = self.members[extension]
        try:
            with open(self.shard, "rb") as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise UserError(f"shard {self.shard}: cannot be read: {error.strerror}") from None
        if len(data) != member.size:
            raise UserError(
                f"shard {self.shard}: truncated at offset {member.offset + len(data)} inside "
                f"{member.name}; write the shard again"
            )
        return data


@register("source", "webdataset", title="WebDataset tar shards")
class WebDataset:
    """Samples of tar shards on a file system, random-access by an index of each shard.

    Text is a `.txt` member, or a `.json` member with a field; an image is a member with an
    image's extension and a `.cls` member with its class number. Class names come from a file
    `classes.txt` beside the first shard, a name on each line, where there is one.

    Args:
        path: a shard, a glob, a brace pattern such as train-{000..127}.tar, or a list of these.
        field: the key of a `.json` member that holds the text.
    """

    def __init__(self, cache: Path | None = None, *, path: Paths, field: str = "text"):
        self.cache = cache
        self.path = path
        self.field = field

    @cached_property
    def shards(self) -> list[Path]:
        """The shards that the path names."""
        from webdataset.shardlists import expand_urls

        given = [self.path] if isinstance(self.path, str) else self.path
        return expand([url for item in given for url in expand_urls(item)])

    @cached_property
    def samples(self) -> list[Sample]:
        """Every sample, in the order of the shards."""
        from webdataset.tariterators import base_plus_ext

        found: list[Sample] = []
        for shard in self.shards:
            first = len(found)
            for member in index_shard(shard, self.cache):
                stem, extension = base_plus_ext(member.name)
                if stem is None:
                    continue  # a name without extension belongs to no sample
                extension = extension.lower()
                if len(found) == first or found[-1].stem != stem:
                    found.append(Sample(shard, stem, {}))
                if extension in found[-1].members:
                    raise UserError(
                        f"shard {shard}: {member.name} at offset {member.offset} occurs twice in "
                        f"its sample; give every sample its own stem"
                    )
                found[-1].members[extension] = member
        if not found:
            raise UserError(f"{self.shards[0]}: the shards hold no samples")
        return found

    def fingerprint(self) -> str:
        whole = hashlib.sha256(self.field.encode())
        for shard in self.shards:
            whole.update(digest(shard, self.cache).encode())
        return whole.hexdigest()

    def documents(self) -> Iterator[Document]:
        for sample in self.samples:
            extension = next((e for e in _TEXT if e in sample.members), None)
            if extension is None:
                raise _lacks(sample, "text: a .txt or .json member")
            place = sample.place(extension)
            text = decode(sample.bytes(extension), place)
            if extension == "json":
                text = text_field(text, self.field, place)
            yield Document(f"{sample.shard}:{sample.stem}", text)

    def classes(self) -> Sequence[str]:
        labels = self.labels()
        count = int(labels.max()) + 1
        names = self.shards[0].parent / CLASS_NAMES
        if not names.exists():
            return [str(number) for number in range(count)]
        listed = decode(names.read_bytes(), names).splitlines()
        if len(listed) < count:
            raise UserError(
                f"{names}: names {len(listed)} classes, but the shards have class {count - 1}"
            )
        return listed

    def labels(self) -> npt.NDArray[np.int64]:
        return self._labels

    @cached_property
    def _labels(self) -> npt.NDArray[np.int64]:
        return np.array([self._label(sample) for sample in self.samples], dtype=np.int64)

    def _label(self, sample: Sample) -> int:
        if "cls" not in sample.members:
            raise _lacks(sample, "a class: a .cls member")
        label = _decoded(sample, "cls")
        if label < 0:
            raise UserError(f"{sample.place('cls')}: class {label} is below 0")
        return int(label)

    def read(self, index: int) -> Pixels:
        sample = self.samples[index]
        for extension in sample.members:
            if f".{extension}" in IMAGES:
                return decode_image(sample.bytes(extension), sample.place(extension))
        raise _lacks(sample, "an image")


def _decoded(sample: Sample, extension: str) -> Any:
    """A member as WebDataset's own handlers decode it."""
    from webdataset.autodecode import basichandlers

    try:
        return basichandlers(extension, sample.bytes(extension))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{sample.place(extension)}: not a valid .{extension}: {error}") from None


def _lacks(sample: Sample, what: str) -> UserError:
    have = ", ".join(f".{extension}" for extension in sample.members)
    return UserError(f"shard {sample.shard}: sample {sample.stem} lacks {what} (it has {have})")
