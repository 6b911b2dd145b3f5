"""Who keeps the others waiting: from what each rank says of itself to the one line of a failure.

A rank that waits in an operation waits for those who have not entered it. Each of these is either
to blame, because it is dead, frozen, ended or busy elsewhere, or waits itself, and then the search
goes on with what it waits for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from parallel.inflight import Operation, spans


@dataclass(frozen=True)
class State:
    """What a rank publishes of itself.

    Args:
        beat: grows for as long as the process lives.
        step: the optimizer step it is in, from 1; 0: before the first.
        at: the line of Python its main thread is at.
        entered: group → the last collective entered.
        waiting: the oldest operation that is not done.
        ended: how it ended, in a line, if it has.
        host, process: where it runs.
    """

    beat: int = 0
    step: int = 0
    at: str = ""
    entered: Mapping[str, int] = field(default_factory=dict)
    waiting: Operation | None = None
    ended: str = ""
    host: str = ""
    process: int = 0

    def pack(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def unpack(cls, text: str | bytes) -> State:
        values = json.loads(text)
        if values["waiting"] is not None:
            waiting = values["waiting"]
            values["waiting"] = Operation(**{**waiting, "ranks": tuple(waiting["ranks"])})
        return cls(**values)


@dataclass(frozen=True)
class Unclear:
    """These ranks must be asked before anybody can be blamed."""

    ranks: frozenset[int]


def blame(start: int, states: Mapping[int, State], silent: Mapping[int, str]) -> str | Unclear:
    """The one line that says why rank `start`, which waits in an operation, waits in vain.

    Args:
        states: what is known, at least of `start`.
        silent: ranks that give no sign of life → how that is known ("has died", …).
    """
    path: list[int] = []
    rank = start
    while True:
        path.append(rank)
        operation = states[rank].waiting
        assert operation is not None
        others = [operation.peer] if operation.peer is not None else list(operation.ranks)
        others = [other for other in others if other != rank]
        unknown = frozenset(o for o in others if o not in states and o not in silent)
        if unknown:
            return Unclear(unknown)
        absent = [other for other in others if _absent(other, operation, states, silent)]
        guilty = {o: _why(o, states, silent) for o in absent}
        guilty = {o: why for o, why in guilty.items() if why}
        if guilty:
            return tell(guilty, operation, states[rank].step)
        ahead = [other for other in absent if other not in path]
        if not ahead:
            return _tangle(path, absent, operation, states)
        rank = ahead[0]


def _absent(
    other: int, operation: Operation, states: Mapping[int, State], silent: Mapping[int, str]
) -> bool:
    """Whether the operation waits for `other`."""
    if other in silent or states[other].ended or operation.peer is not None:
        return True
    return states[other].entered.get(operation.group, 0) < operation.call


def _why(other: int, states: Mapping[int, State], silent: Mapping[int, str]) -> str:
    """What `other` did wrong; empty if it waits for somebody itself."""
    state = states.get(other, State())
    if state.ended:
        return state.ended
    if other in silent:
        return silent[other]
    if state.waiting is None:
        where = f": it is at {state.at}" if state.at else ""
        return f"has not come to the collective{where}"
    return ""


def tell(guilty: Mapping[int, str], operation: Operation, step: int) -> str:
    """The line of a failure: which ranks did what, and where the others were."""
    reasons = Counter(guilty.values())
    told = "; ".join(
        f"{_ranks([rank for rank, why in guilty.items() if why == reason])} {reason}"
        for reason, _ in reasons.most_common(3)
    )
    return f"{told}; the others waited in {operation}, {_step(step)}"


def _tangle(
    path: list[int], absent: list[int], operation: Operation, states: Mapping[int, State]
) -> str:
    """Nobody is to blame alone: ranks wait for one another, or all are in it and it hangs."""
    if absent:
        ring = sorted(path[path.index(absent[0]) :])
        parts = "; ".join(f"rank {rank} in {states[rank].waiting}" for rank in ring[:4])
        return f"{_ranks(ring)} wait for one another, {_step(states[path[0]].step)}: {parts}"
    calls = {
        rank: states[rank].waiting
        for rank in operation.ranks
        if rank in states and states[rank].waiting is not None
    }
    kinds = Counter((o.name, o.tensors) for o in calls.values() if o and o.call == operation.call)
    if len(kinds) > 1:
        common = kinds.most_common(1)[0][0]
        odd = [r for r, o in calls.items() if o is not None and (o.name, o.tensors) != common]
        return (
            f"{_ranks(odd)} entered {calls[odd[0]]} where the others are in "
            f"{common[0]} ({common[1]}), {_step(states[path[0]].step)}"
        )
    return (
        f"all ranks have entered {operation}, {_step(states[path[-1]].step)}, and it does not end: "
        f"look at the network between them"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {spans(sorted(ranks))}"


def _step(step: int) -> str:
    return f"step {step}" if step else "before the first step"
