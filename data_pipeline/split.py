"""What trains and what is held out, as a pure function of the data and the config.

Documents are chosen by a hash of their text, so the choice does not depend on their order, copies
of a document fall on the same side, and growing the data moves no document across.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from core.errors import UserError
from core.hashing import stable_hash
from data_pipeline.config import ValidationConfig
from data_pipeline.order import Indices
from data_pipeline.sources.base import TextSource

FEW = 20  # with fewer documents a share of them is too coarse a measure
Side = Literal["train", "validation"]


@dataclass(frozen=True)
class Plan:
    """How many leading characters of each document train; the rest is held out."""

    how: str
    cuts: Indices
    lengths: Indices

    @property
    def training_characters(self) -> int:
        return int(self.cuts.sum())


class SplitText:
    """A source of text, divided.

    Args:
        source: the documents.
        name: what error messages call the source.
        how: the division, or the one side that takes all.
    """

    def __init__(self, source: TextSource, name: str, how: ValidationConfig | Side):
        self.source = source
        self.name = name
        self.how = how

    @cached_property
    def plan(self) -> Plan:
        """Made in one pass over the documents.

        Raises:
            UserError: if there is no text, or too little to divide.
        """
        how = self.how
        seed = 0 if isinstance(how, str) else how.seed
        lengths, hashes = [], []
        for document in self.source.documents():
            lengths.append(len(document.text))
            hashes.append(stable_hash(seed, document.text))
        sizes = np.asarray(lengths, dtype=np.int64)
        if not sizes.sum():
            raise UserError(f"source {self.name}: there is no text in it")
        if isinstance(how, str):
            return Plan(how, sizes if how == "train" else np.zeros_like(sizes), sizes)
        by = how.by
        if by == "auto":
            by = "document" if np.count_nonzero(sizes) >= FEW else "tail"
        cuts = (
            _by_document(self.name, sizes, hashes, how.fraction)
            if by == "document"
            else _by_tail(self.name, sizes, how.fraction)
        )
        return Plan(by, cuts, sizes)

    @cached_property
    def fingerprint(self) -> str:
        """The source's, which may read all of it."""
        return self.source.fingerprint()

    def parts(self) -> Iterator[tuple[str, str]]:
        """Each document's training text and held-out text; either may be empty."""
        for document, cut in zip(self.source.documents(), self.plan.cuts.tolist(), strict=True):
            yield document.text[:cut], document.text[cut:]


def _by_document(name: str, sizes: Indices, hashes: Sequence[int], fraction: float) -> Indices:
    filled = {h for h, size in zip(hashes, sizes.tolist(), strict=True) if size}
    if len(filled) < 2:
        raise UserError(
            f"source {name}: one document cannot be divided by document; set "
            f"data.validation.by=tail"
        )
    limit = int(fraction * 2**64)
    held = {h for h in filled if h < limit}
    if not held:
        held = {min(filled)}
    elif held == filled:
        held.remove(max(held))
    out = np.array([h in held for h in hashes])
    return np.where(out, 0, sizes)


def _by_tail(name: str, sizes: Indices, fraction: float) -> Indices:
    total = int(sizes.sum())
    if total < 2:
        raise UserError(f"source {name}: one character cannot be divided")
    # In parts of a billion, so that 0.1 of the text is what a reader expects of 0.1.
    training = total * (10**9 - round(fraction * 10**9)) // 10**9
    training = min(max(training, 1), total - 1)
    starts = np.cumsum(sizes) - sizes
    cuts: Indices = np.clip(training - starts, 0, sizes)
    return cuts


def split_labels(
    labels: Indices, fingerprint: str, how: ValidationConfig
) -> tuple[Indices, Indices]:
    """The indexes of training and held-out images, the same share of every class held out.

    Raises:
        UserError: if no class has two images.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda i: stable_hash(how.seed, fingerprint, i))
        count = round(how.fraction * len(members))
        held[members[: min(max(count, 1), len(members) - 1)]] = True
    if not held.any():
        raise UserError("no class of images has two of them, so none can be held out")
    return np.flatnonzero(~held), np.flatnonzero(held)
