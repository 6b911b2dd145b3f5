"""What a run that came to its end tells: how good it is, a sample, and what to do next."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from shlex import quote
from typing import Any

from data_pipeline.data import Data
from launcher.config import RunConfig
from launcher.generate import continue_text
from launcher.trained import load_trained
from model.language import LanguageConfig

SAMPLED = 2 * 10**9
"""A model with more parameters than this is not loaded again on one process for a sample."""


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of a text under general compressors, at their usual command-line settings."""
    sizes = {
        "gzip -9": len(gzip.compress(text, compresslevel=9)),
        "xz": len(lzma.compress(text, preset=6)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def finish(folder: Path, config: RunConfig, data: Data) -> None:
    """Print the end of a run that did all its steps, as its summary has it."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf8"))
    lines = ["", *_worth(data, summary["validation"])]
    model = config.model
    small = summary["counts"].get("parameters", 0) <= SAMPLED
    if isinstance(model, LanguageConfig) and model.architecture == "decoder" and small:
        sample = continue_text(load_trained(folder), "")
        lines += ["", "A sample:", "", *("  | " + line for line in sample.splitlines())]
    lines += ["", *commands(folder, config.train.steps, model.kind)]
    print("\n".join(lines), flush=True)


def _worth(data: Data, validation: dict[str, float]) -> list[str]:
    lines = [f"Held-out loss {validation['loss']:.4f} nats"] if "loss" in validation else []
    if "accuracy" in validation:
        lines.append(f"Held-out accuracy {validation['accuracy']:.2%}")
    text = data.validation_text() if "bits_per_byte" in validation else b""
    if text:
        lines.append(f"Bits per byte of the held-out text ({len(text):,} bytes):")
        rows = {"this model": validation["bits_per_byte"], **compressors(text)}
        lines += [f"  {name:<12}{bits:.3f}" for name, bits in rows.items()]
    return lines


def commands(folder: Path, steps: int, kind: str) -> list[str]:
    """What can be typed next."""
    place = quote(str(folder))
    rows = [
        (f"manyforms resume {place} train.steps={2 * steps}", "train on"),
        (f"manyforms eval {place}", "evaluate"),
    ]
    if kind == "language":
        rows.append((f"manyforms generate {place} --prompt 'import os'", "write"))
    rows.append((f"tensorboard --logdir {quote(str(folder / 'tensorboard'))}", "see the curves"))
    width = max(len(command) for command, _ in rows)
    return ["Next:", *(f"  {command:<{width}}  # {what}" for command, what in rows)]
