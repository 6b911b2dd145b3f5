"""Hashes and permutations are part of the data position: their values may never change."""

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.hashing import file_digest, permute, stable_hash


def test_stable_hash_known_values() -> None:
    assert stable_hash(1, "a", b"b") == 2949085334410863860
    assert stable_hash("1") == 16053524957224858672
    assert stable_hash() == stable_hash()


def test_stable_hash_keeps_types_and_boundaries_apart() -> None:
    values = [
        stable_hash(*parts) for parts in [("1",), (1,), (b"1",), ("ab", "c"), ("a", "bc"), ("abc",)]
    ]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**64 for value in values)


def test_stable_hash_is_the_same_in_another_process() -> None:
    code = "from core.hashing import stable_hash; print(stable_hash('seed', 3))"
    root = Path(__file__).parents[2]
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert printed == {f"{stable_hash('seed', 3)}\n"}


def test_permute_known_values() -> None:
    assert [permute(i, 10, 7) for i in range(10)] == [6, 2, 4, 9, 3, 8, 7, 0, 1, 5]
    assert permute(123456, 10**9, 42) == 792170374


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 100, 255, 256, 257, 1000, 4096, 4097])
def test_permute_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(permute(i, size, seed) for i in range(size)) == list(range(size))


@given(
    size=st.integers(1, 2**40),
    seed=st.integers(0, 2**64 - 1),
    where=st.floats(0, 1, exclude_max=True),
)
def test_permute_stays_inside_large_sizes(size: int, seed: int, where: float) -> None:
    assert 0 <= permute(int(where * size), size, seed) < size


def test_permute_shuffles() -> None:
    """Few points stay in place, and neighbours do not stay neighbours."""
    order = [permute(i, 10_000, 3) for i in range(10_000)]
    assert sum(a == i for i, a in enumerate(order)) < 10
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 20
    assert order != [permute(i, 10_000, 4) for i in range(10_000)]


@pytest.mark.parametrize("index", [-1, 10])
def test_permute_refuses_what_is_outside(index: int) -> None:
    with pytest.raises(IndexError, match="outside a permutation of 10"):
        permute(index, 10, 0)


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    assert file_digest(tmp_path / "f") == hashlib.sha256(b"x" * 100_000).hexdigest()
