"""`manyforms zoo --check FILE.py`: a plugin's mechanisms go through the project's own proofs."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from core.registry import load_plugin
from evaluation.contracts.probe import mechanisms
from evaluation.contracts.ranks import Ranks
from evaluation.contracts.run import run
from launcher.exits import FAILED, OK

MARKS = {"proven": "ok", "declared": "--", "failed": "FAILED"}


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
    ranks = Ranks(2)
    try:
        for result in run(found, ranks, (str(path.resolve()),)):
            mark = MARKS[result.status]
            line = f"{mark:<7}{result.mechanism}  {result.contract}  {result.reason}"
            print(line.rstrip(), flush=True)
            failed += result.status == "failed"
    finally:
        ranks.close()
    return FAILED if failed else OK
