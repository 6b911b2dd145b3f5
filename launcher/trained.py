"""A trained model, read back from a run's folder on one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import parse_step
from checkpoints.inspect import find_checkpoint
from checkpoints.store import CheckpointStore
from core.errors import UserError
from data_pipeline.tokenizers.base import Tokenizer
from launcher.config import RunConfig, load_run
from model.zoo import build_model
from parallel.layout import Layout
from parallel.native import NativeEngine

TOKENIZER = "tokenizer"
"""The folder inside a run's folder that holds its tokenizer."""


@dataclass(frozen=True)
class Trained:
    """A model on this process's device, and what it was trained with."""

    folder: Path
    step: int
    config: RunConfig
    engine: NativeEngine

    @property
    def tokenizer(self) -> Tokenizer:
        """What the model's ids mean."""
        return Tokenizer.load(self.folder / TOKENIZER)


def run_folder(place: Path) -> Path:
    """The run's folder, given it, its checkpoints folder or one checkpoint.

    Raises:
        UserError: there is no run.
    """
    for folder in (place, place.parent, place.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    if not place.exists():
        raise UserError(f"{place}: no such folder; give a run's folder or one of its checkpoints")
    raise UserError(f"{place}: there is no config.yaml of a run in it or above it")


def load_trained(place: Path) -> Trained:
    """The model of a run's newest checkpoint, or of the checkpoint given.

    A run that keeps a moving average of its weights is read as that average.

    Raises:
        UserError: there is no run or no checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    folder = run_folder(place)
    config = load_run(folder / "config.yaml")
    step = parse_step(find_checkpoint(place).name) if parse_step(place.name) is not None else None
    find_checkpoint(place)  # one line for a run that has not saved yet
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = NativeEngine(Layout(), device)
    with torch.device("meta"):
        model = build_model(config.model)
    engine.prepare(model, seed=config.run.seed, precision=config.train.precision)
    store = CheckpointStore(folder / "checkpoints")
    state = engine.model_state()
    loaded = store.load({"model": state}, step)
    engine.load_model_state(state)
    if config.train.ema is not None:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        average: dict[str, Any] = {k: v for k, v in engine.model_state().items() if k in trainable}
        store.load({"average": average}, loaded.step)
        engine.load_model_state({**engine.model_state(), **average})
    model.eval()
    return Trained(folder, loaded.step, config, engine)
