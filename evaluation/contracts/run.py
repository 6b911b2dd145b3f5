"""Put mechanisms through every contract and say what came out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from core.errors import UserError
from core.registry import Entry
from evaluation.contracts.distributed import CONTRACTS, concerns, prove, reshard
from evaluation.contracts.local import PROOFS, applies
from evaluation.contracts.probe import probe
from evaluation.contracts.ranks import Ranks
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
        for contract, held in CONTRACTS.items():
            if held.world > (1 if ranks is None else 2) or not concerns(contract, subject):
                continue
            reason = next((r for need in held.needs if (r := declared(entry, need))), None)
            if reason is not None:
                yield Result(name, contract, "declared", reason)
            else:
                yield _result(
                    name, contract, lambda c=contract, s=subject: prove(c, s, ranks, plugins)
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
