"""A tiny run to write down, and the command as a user calls it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TINY = """\
run: {name: tiny, dir: RUN}
model:
  dim: 16
  depth: 2
  block: {mixer: {name: attention, heads: 2}, feedforward: {name: swiglu, ratio: 2.0}}
data: {sources: TEXT, sequence: 16, tokenizer: characters, validation: {by: tail, fraction: 0.2}}
parallel: {replicate: -1, fsdp: 1}
train: {steps: 6, global_batch: 4, log_every: 1}
checkpoint: {every: 2, keep: 0, async: false}
"""


def write_tiny(folder):
    """The config of a run that takes a second, in a folder of its own; the config's path."""
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)), encoding="utf8")
    config = folder / "tiny.yaml"
    filled = TINY.replace("RUN", str(folder / "run")).replace("TEXT", str(text))
    config.write_text(filled, encoding="utf8")
    return config


def manyforms(*words, timeout=120, **environment):
    """The command in a process of its own: exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr
