"""Put mechanisms through every contract and say what came out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from core.errors import UserError
from core.registry import Entry
from evaluation.contracts.distributed import CONTRACTS, Ranks, prove, reshard
from evaluation.contracts.local import PROOFS, applies
from evaluation.contracts.probe import probe
from evaluation.contracts.report import Result, declared


def run(
    entries: Iterable[Entry], ranks: Ranks | None, plugins: tuple[str, ...] = ()
) -> Iterator[Result]:
    """Every contract of every entry; those of several processes where a pool of two is given."""
    for entry in entries:
        name = f"{entry.slot}:{entry.name}"
        subject = probe(entry)
        for contract, proof in PROOFS.items():
            reason = declared(entry, contract)
            if reason is not None:
                yield Result(name, contract, "declared", reason)
            elif applies(contract, subject):
                yield _result(name, contract, lambda p=proof, s=subject: p(s))
        for held in CONTRACTS.values():
            if held.world > 2 or (held.world == 2 and ranks is None):
                continue
            reason = next((r for need in held.needs if (r := declared(entry, need))), None)
            if reason is not None:
                yield Result(name, held.name, "declared", reason)
            else:
                yield _result(
                    name, held.name, lambda c=held, s=subject: prove(c, s, ranks, plugins)
                )
        if ranks is not None:
            yield _result(name, "reshard", lambda s=subject: reshard(s, ranks, plugins))


def _result(name: str, contract: str, proof: object) -> Result:
    assert callable(proof)
    try:
        proof()
    except (AssertionError, UserError, RuntimeError, TypeError, ValueError, KeyError) as error:
        text = str(error).strip().splitlines()
        return Result(
            name, contract, "failed", f"{type(error).__name__}: {text[-1] if text else ''}"
        )
    return Result(name, contract, "proven")
