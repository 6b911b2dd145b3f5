"""Eight rank processes, for cubes."""

from collections.abc import Iterator

import pytest

from evaluation.contracts.ranks import Ranks


@pytest.fixture(scope="session")
def eight_ranks() -> Iterator[Ranks]:
    """Started at first use and kept for the session."""
    ranks = Ranks(8)
    yield ranks
    ranks.close()
