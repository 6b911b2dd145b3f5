"""Everything that one GPU can show, in one run, with a table at the end.

    python -m benchmarks.gpu [--only NAME …] [--out FILE]

The contracts on CUDA against the CPU, attention kernels beside each other, experts in one kernel,
a training step of a billion parameters, and what of Megatron-core needs a GPU. Without a GPU it
says so in one line. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import attention, contracts, experts, megatron, step
from benchmarks.gpu.rows import Row, table

PARTS: dict[str, Callable[[], list[Row]]] = {
    "contracts": contracts.main,
    "attention": attention.main,
    "experts": experts.main,
    "step": step.main,
    "megatron": megatron.main,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; every part of the queue needs one")
        return 2
    head = (
        f"{time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, Python {platform.python_version()}\n"
    )
    rows: list[Row] = []
    for name in options.only:
        began = time.monotonic()
        found = PARTS[name]()
        rows += found
        print(table(found), flush=True)  # a later part may fail hard
        print(f"{name}: {time.monotonic() - began:.0f} s\n", flush=True)
    text = f"{head}\n{table(rows)}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf8")
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
