"""What every test may rely on: one thread a process, and no network but this machine's own."""

import os

# Before torch is imported anywhere, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evaluation.contracts.ranks import Ranks

torch.set_num_threads(1)

_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        assert host == "localhost" or ipaddress.ip_address(host).is_loopback, (
            f"a test tried to reach {host}; tests run without a network"
        )
    _connect(self, address)


socket.socket.connect = _connect_locally  # type: ignore[method-assign]


def _pool(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two rank processes, started at first use and kept for the session."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four of them, for slow tests."""
    yield from _pool(4)
