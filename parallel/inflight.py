"""What this rank waits for: the operations it has entered and that are not done.

PyTorch's flight recorder keeps the last operations of every group, for gloo and NCCL, whoever
issues them: the leaf operations, FSDP2, DDP, checkpoints. Gloo's leaves out sends and receives,
which are noted here while something waits for them.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

RECORDS = 256
"""Operations that the recorder keeps; reading them all takes a millisecond or two."""
_dump: Any = torch._C._distributed_c10d._dump_fr_trace  # type: ignore[attr-defined]
_RECORDER = "TORCH_FR_BUFFER_SIZE"
_TYPES = {
    "Float": ("float32", 4), "Double": ("float64", 8), "Half": ("float16", 2),
    "BFloat16": ("bfloat16", 2), "Long": ("int64", 8), "Int": ("int32", 4),
    "Short": ("int16", 2), "Char": ("int8", 1), "Byte": ("uint8", 1), "Bool": ("bool", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """A collective, or a send or receive, that a rank has entered.

    Args:
        name: all_reduce, recv, …
        group: the group's name, alike on all its ranks.
        axis: of the mesh; empty for the group of all ranks.
        ranks: those of the group, ascending.
        call: which collective of the group it is, from 1; 0: a send or receive.
        tensors: types, sizes and bytes of this rank's part, for people.
        peer: the other rank of a send or receive.
        patience: the group's own time-out in seconds.
        background: a thread beside the training issued it, such as an asynchronous save.
    """

    name: str
    group: str
    axis: str
    ranks: tuple[int, ...]
    call: int
    tensors: str
    peer: int | None = None
    patience: float = 0.0
    background: bool = False

    def __str__(self) -> str:
        where = f"over {self.axis}" if self.axis else "over all ranks"
        if self.peer is not None:
            return f"{self.name} with rank {self.peer} {where} ({self.tensors})"
        who = f" (ranks {spans(self.ranks)})" if self.axis else ""
        facts = ", ".join(filter(None, (self.tensors, f"call {self.call}")))
        return f"{self.name} {where}{who} ({facts})"


@dataclass
class InFlight:
    """A look at the operations of this rank.

    Args:
        entered: group → the last collective entered.
        waiting: the operations that are not done, the oldest first.
        last: the newest operation, done or not.
    """

    entered: dict[str, int] = field(default_factory=dict)
    waiting: list[Operation] = field(default_factory=list)
    last: Operation | None = None


def spans(ranks: Sequence[int]) -> str:
    """Ascending ranks, briefly: 0-3, 8."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def tensors(sizes: Sequence[Sequence[int]], types: Sequence[str]) -> str:
    """Types, sizes and bytes in words: `float32 8×4, 128 bytes`."""
    if not sizes:
        return ""
    known = [_TYPES.get(name, (name, 0)) for name in types]
    total = sum(math.prod(size) * width for size, (_, width) in zip(sizes, known, strict=False))
    shape = "×".join(map(str, sizes[0])) or "scalar"
    first = f"{known[0][0]} {shape}" if known else shape
    more = f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""
    return f"{first}{more}, {total:,} bytes"


class Recorder:
    """Reads what is in flight; one for each process group that is joined.

    It must be made before the first process group of the process: the recorder reads its size once.
    """

    def __init__(self) -> None:
        os.environ.setdefault(_RECORDER, str(RECORDS))
        _note_point_to_point()
        self._entered: dict[str, int] = {}

    def look(self) -> InFlight:
        """What is in flight now."""
        groups = _groups()
        # Autograd's threads on a GPU work for the main thread, and are not Python's.
        beside = {
            thread.ident
            for thread in threading.enumerate()
            if thread is not threading.main_thread()
            and not isinstance(thread, threading._DummyThread)
        }
        seen = InFlight(self._entered)
        for record in pickle.loads(_dump(True, False, False)).get("entries", ()):
            operation = _operation(record, groups, beside)
            if operation is None:
                continue
            if operation.peer is None:
                held = self._entered.get(operation.group, 0)
                self._entered[operation.group] = max(held, operation.call)
            seen.last = operation
            if not _done(record):
                seen.waiting.append(operation)
        seen.waiting += [
            _known_as(*note, groups) for note in list(_waits.values()) if note[0] in groups
        ]
        return seen


def _done(record: Mapping[str, Any]) -> bool:
    # Gloo only retires; NCCL's own watchdog also sees the kernel end.
    return bool(record["retired"]) or record["state"] == "completed"


_Groups = dict[str, tuple[str, tuple[int, ...]]]


def _groups() -> _Groups:
    """Group name → axis and global ranks, of the groups this rank is in."""
    found: _Groups = {}
    for group, ranks in list(dist.distributed_c10d._world.pg_group_ranks.items()):
        if not isinstance(group, dist.ProcessGroup):
            continue  # a group without this rank
        description = group.group_desc
        axis = "" if description == "default_pg" else description.removeprefix("mesh_")
        found[group.group_name] = ("a group" if axis == "undefined" else axis, tuple(sorted(ranks)))
    return found


def _operation(
    record: Mapping[str, Any], groups: _Groups, beside: set[int | None]
) -> Operation | None:
    """The operation of a record of the flight recorder; None if its group is gone."""
    group = record["process_group"][0]
    if group not in groups:
        return None
    axis, ranks = groups[group]
    name = record["profiling_name"].partition(":")[2] or record["profiling_name"]
    peer = None
    if record["is_p2p"]:  # NCCL: "recv 1<-0", this rank first, counted within the group
        match = re.fullmatch(r"(\w+) \d+(?:->|<-)(\d+)", name)
        if match is None:
            return None
        name, peer = match[1], ranks[int(match[2])]
    return Operation(
        name,
        group,
        axis,
        ranks,
        0 if peer is not None else record["collective_seq_id"],
        tensors(record["input_sizes"], record["input_dtypes"]),
        peer,
        record["timeout_ms"] / 1000,
        int(record.get("thread_id", 0)) in beside,
    )


# Gloo's sends and receives: what each is, and which of them a thread waits for.
_Note = tuple[str, str, int, str]
_notes: weakref.WeakKeyDictionary[dist.Work, _Note] = weakref.WeakKeyDictionary()
_waits: dict[int, _Note] = {}


def _known_as(group: str, name: str, peer: int, what: str, groups: _Groups) -> Operation:
    axis, ranks = groups[group]
    return Operation(name, group, axis, ranks, 0, what, ranks[peer])


@functools.cache
def _note_point_to_point() -> None:
    """Note sends and receives of gloo, and the waits for them; once a process."""
    process_group: Any = dist.ProcessGroup
    work: Any = dist.Work
    wait = work.wait

    def noting(name: str) -> None:
        issue = getattr(process_group, name)

        @functools.wraps(issue)
        def issued(self: Any, values: Any, peer: int, *rest: Any) -> Any:
            handle = issue(self, values, peer, *rest)
            if handle is not None and self.name() == "gloo":
                kinds = [str(value.dtype).removeprefix("torch.") for value in values]
                sizes = [tuple(value.shape) for value in values]
                total = sum(value.numel() * value.element_size() for value in values)
                what = f"{kinds[0]} {'×'.join(map(str, sizes[0])) or 'scalar'}, {total:,} bytes"
                _notes[handle] = (self.group_name, name, peer, what)
            return handle

        setattr(process_group, name, issued)

    @functools.wraps(wait)
    def waited(self: Any, *args: Any) -> Any:
        note = _notes.get(self)
        if note is None:
            return wait(self, *args)
        here = threading.get_ident()
        _waits[here] = note
        try:
            return wait(self, *args)
        finally:
            _waits.pop(here, None)

    noting("send")
    noting("recv")
    work.wait = waited
