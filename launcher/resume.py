"""`manyforms resume`: a run goes on exactly where it stopped, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import parse_step
from checkpoints.inspect import find_checkpoint
from core.config import Config, Source, apply_overrides, read_yaml
from core.errors import UserError
from launcher.checks import wrong
from launcher.config import RunConfig, load_run, parse_run
from launcher.job import plan, run, write_folder
from launcher.trained import run_folder
from model.zoo import build_model


def resume(place: Path, overrides: Sequence[str], nproc: int | None) -> int:
    """Continue a run from its newest checkpoint that verifies; its exit code.

    Raises:
        UserError: there is nothing to resume, or an override makes it another model.
    """
    folder = run_folder(place)
    path = folder / "config.yaml"
    before = load_run(path)
    data, source = read_yaml(path)
    apply_overrides(data, overrides, source)
    data["run"]["dir"] = str(folder)  # it may have been moved
    config = parse_run(data, source, path)
    check_same_model(before, config, source)
    job = plan(config, source, nproc)
    step = parse_step(find_checkpoint(folder).name)
    if step is not None and step >= job.config.train.steps:
        raise UserError(
            f"{folder}: all {job.config.train.steps} steps are done; to train on, give more: "
            f"train.steps={2 * step}"
        )
    return run(job, write_folder, resume=True)


def check_same_model(before: RunConfig, after: RunConfig, source: Source) -> None:
    """The checkpoint's tensors fit, and its ids mean what they did.

    Raises:
        UserError: naming the key that changed.
    """
    if before.data.tokenizer != after.data.tokenizer:
        raise wrong(
            source, "data.tokenizer", "cannot change in a run that has begun; start a new one"
        )
    changed = list(_differences(before.model, after.model, "model"))
    if changed and _shapes(before.model) != _shapes(after.model):
        raise wrong(
            source,
            changed[0],
            "changes the shape of the model, so its checkpoints do not fit; start a new run",
        )


def _shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = build_model(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _differences(before: Any, after: Any, key: str) -> Iterator[str]:
    """The keys at which two configs differ."""
    if isinstance(before, Config) and type(before) is type(after):
        for name in type(before).model_fields:
            yield from _differences(getattr(before, name), getattr(after, name), f"{key}.{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differences(one, other, f"{key}.{index}")
    elif before != after:
        yield key
