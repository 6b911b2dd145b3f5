"""Stable integer hashing: the same on every machine, interpreter and run.

Python's own `hash` is salted per process, so nothing that must be repeatable may use it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

Hashable = int | str | bytes


def stable_hash(*parts: Hashable) -> int:
    """A 64-bit unsigned hash of integers, strings and bytes; types and boundaries count."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        kind = type(part).__name__.encode()
        body = part if isinstance(part, bytes) else str(part).encode()
        digest.update(kind + b":" + str(len(body)).encode() + b":" + body)
    return int.from_bytes(digest.digest(), "little")


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def permute(index: int, size: int, seed: int) -> int:
    """Where `index` of range(size) lands under the pseudo-random permutation named by `seed`.

    A balanced Feistel network with cycle walking: O(1) memory, so a shuffle of any length is a
    pure function of (seed, index) and needs no stored order.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside a permutation of {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, seed, turn) & mask)
        value = (left << half) | right
        if value < size:
            return value


def _mix(value: int, seed: int, turn: int) -> int:
    """SplitMix64's finaliser over the round's inputs."""
    word = (value + seed * 0x9E3779B97F4A7C15 + (turn + 1) * 0xD1B54A32D192ED03) & (2**64 - 1)
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return word ^ (word >> 31)
