"""The pool of ranks itself."""

from __future__ import annotations

import pytest

from core.errors import UserError
from evaluation.contracts.ranks import RankFailure, Ranks
from tests.parallel import workers


def test_every_rank_answers(ranks: Ranks) -> None:
    assert ranks.run(workers.rank_and_sum) == [(0, 2.0), (1, 2.0)]


def test_what_all_ranks_raise_is_raised(ranks: Ranks) -> None:
    with pytest.raises(UserError, match="all of us"):
        ranks.run(workers.all_mistaken)
    assert ranks.run(workers.rank_and_sum) == [(0, 2.0), (1, 2.0)]


def test_one_failing_rank_is_named_and_hangs_nobody(ranks: Ranks, monkeypatch) -> None:
    monkeypatch.setattr("evaluation.contracts.ranks.GRACE", 1.0)
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 failed.*ValueError: this one"):
        ranks.run(workers.one_after_another, 1)
    assert ranks.run(workers.rank_and_sum) == [(0, 2.0), (1, 2.0)]


def test_a_call_that_hangs_ends(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match=r"did not finish in 0 seconds"):
        ranks.run(workers.rank_and_sum, timeout=0.0)
    assert ranks.run(workers.rank_and_sum) == [(0, 2.0), (1, 2.0)]
