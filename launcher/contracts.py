"""`manyforms zoo --check FILE.py`: a plugin's mechanisms go through the project's own proofs."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from core.registry import load_plugin
from evaluation.contracts.local import PROOFS, applies
from evaluation.contracts.probe import Probe, mechanisms, probe
from evaluation.contracts.report import Result, declared
from launcher.exits import FAILED, OK


def check(path: Path) -> int:
    """Prove every mechanism that a file registers; print a line each; the exit code.

    Raises:
        UserError: the file cannot be imported or registers no mechanism.
    """
    module = load_plugin(str(path))
    found = mechanisms(module.__name__)
    if not found:
        raise UserError(f"{path}: registers no mechanism; decorate it with @register(slot, name)")
    failed = 0
    for entry in found:
        subject = probe(entry)
        print(subject.name)
        for result in (prove(subject, contract) for contract in PROOFS):
            if result is not None:
                mark = {"proven": "ok", "declared": "--", "failed": "FAILED"}[result.status]
                print(f"  {mark:<7}{result.contract:<14}{result.reason}".rstrip(), flush=True)
                failed += result.status == "failed"
    return FAILED if failed else OK


def prove(subject: Probe, contract: str) -> Result | None:
    """One contract of one mechanism; None where it says nothing about this kind of mechanism."""
    reason = declared(subject.entry, contract)
    if reason is not None:
        return Result(subject.name, contract, "declared", reason)
    if not applies(contract, subject):
        return None
    try:
        PROOFS[contract](subject)
    except Exception as error:
        what = str(error).strip().split("\n")[0]
        kind = "" if isinstance(error, AssertionError) and what else f"{type(error).__name__}: "
        return Result(subject.name, contract, "failed", kind + what)
    return Result(subject.name, contract, "proven")
