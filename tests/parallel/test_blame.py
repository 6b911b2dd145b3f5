"""Who is to blame, from what the ranks say of themselves."""

from __future__ import annotations

from parallel.blame import State, Unclear, blame
from parallel.inflight import Operation, spans, tensors


def sum_over(axis: str, ranks: tuple[int, ...], call: int) -> Operation:
    return Operation("all_reduce", axis, axis, ranks, call, "float32 8×4, 128 bytes")


def receive(peer: int, ranks: tuple[int, ...]) -> Operation:
    return Operation("recv", "pp", "pp", ranks, 0, "float32 8, 32 bytes", peer)


TP = sum_over("tp", (0, 1), 7)


def test_a_state_survives_the_store() -> None:
    state = State(3, 12, "a.py:1 (f)", {"tp": 7}, TP, "", "here", 5)
    assert State.unpack(state.pack()) == state


def test_one_that_has_not_come() -> None:
    states = {
        0: State(step=12, waiting=TP, entered={"tp": 7}),
        1: State(step=12, at="loader.py:9 (read)", entered={"tp": 6}),
    }
    assert blame(0, states, {}) == (
        "rank 1 has not come to the collective: it is at loader.py:9 (read); the others waited in "
        "all_reduce over tp (ranks 0-1) (float32 8×4, 128 bytes, call 7), step 12"
    )


def test_who_must_be_asked_first() -> None:
    states = {0: State(waiting=TP, entered={"tp": 7})}
    assert blame(0, states, {}) == Unclear(frozenset({1}))
    assert "rank 1 has died" in str(blame(0, states, {1: "has died"}))


def test_one_that_entered_and_died_there() -> None:
    states = {0: State(waiting=TP, entered={"tp": 7}), 1: State(waiting=TP, entered={"tp": 7})}
    assert str(blame(0, states, {1: "has died"})).startswith("rank 1 has died; the others waited")


def test_the_search_follows_those_who_wait_themselves() -> None:
    """0 waits for 1 over tp, 1 waits for 3 over fsdp, and 3 is busy; before the first step."""
    fsdp = sum_over("fsdp", (1, 3), 4)
    states = {
        0: State(waiting=TP, entered={"tp": 7}),
        1: State(waiting=fsdp, entered={"tp": 6, "fsdp": 4}),
    }
    assert blame(0, states, {}) == Unclear(frozenset({3}))
    found = str(blame(0, {**states, 3: State(entered={"fsdp": 3})}, {}))
    assert found.startswith("rank 3 has not come") and "over fsdp" in found
    assert found.endswith("before the first step")


def test_a_pipeline_stage_that_sends_nothing() -> None:
    ranks = (0, 1, 2)
    states = {
        0: State(waiting=receive(1, ranks)),
        1: State(waiting=receive(2, ranks)),
        2: State(at="moe.py:3 (forward)"),
    }
    found = str(blame(0, states, {}))
    assert found.startswith("rank 2 has not come")
    assert "recv with rank 2 over pp (float32 8, 32 bytes)" in found


def test_ranks_that_wait_for_one_another() -> None:
    states = {
        0: State(waiting=TP, entered={"tp": 7, "all": 3}),
        1: State(waiting=sum_over("all", (0, 1), 4), entered={"tp": 6, "all": 4}),
    }
    found = str(blame(0, states, {}))
    assert found.startswith("ranks 0-1 wait for one another") and "call 4" in found


def test_one_that_entered_another_collective() -> None:
    ranks = (0, 1, 2)
    same = {rank: State(waiting=sum_over("dp", ranks, 5), entered={"dp": 5}) for rank in (0, 1)}
    odd = Operation("all_gather", "dp", "dp", ranks, 5, "float32 2, 8 bytes")
    found = str(blame(0, {**same, 2: State(waiting=odd, entered={"dp": 5})}, {}))
    assert found.startswith("rank 2 entered all_gather") and "all_reduce" in found


def test_the_reason_a_rank_gave_itself() -> None:
    states = {0: State(waiting=TP, entered={"tp": 7}), 1: State(ended="failed (OSError: disk)")}
    assert "rank 1 failed (OSError: disk); the others" in str(blame(0, states, {}))


def test_words() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert tensors([[8, 4]], ["Float"]) == "float32 8×4, 128 bytes"
    assert tensors([[2], [1, 3]], ["BFloat16", "Long"]) == "bfloat16 2 and 1 more, 28 bytes"
    assert tensors([[]], ["Long"]) == "int64 scalar, 8 bytes" and tensors([], []) == ""
