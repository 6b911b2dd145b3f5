"""`python -m evaluation.contracts`: prove every mechanism; write contracts.json and zoo.md."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.progress import track

from evaluation.contracts.docs import page
from evaluation.contracts.probe import mechanisms
from evaluation.contracts.ranks import Ranks
from evaluation.contracts.report import Result, save
from evaluation.contracts.run import run


def main(folder: Path) -> int:
    """Run everything; the exit code is 1 if a contract failed."""
    ranks = Ranks(2)
    results: list[Result] = []
    try:
        for entry in track(mechanisms(), "proving"):
            results += run([entry], ranks)
    finally:
        ranks.close()
    table = save(results, folder / "contracts.json")
    (folder / "zoo.md").write_text(page(table), encoding="utf8")
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(f"{result.mechanism} {result.contract}: {result.reason}", file=sys.stderr)
    print(f"{len(results)} contracts, {len(failed)} failed; wrote {folder}/zoo.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")))
