"""A tiny model and tiny data: what the training tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.config import parse
from data_pipeline.data import Data
from model.zoo import build_model
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.native import NativeEngine
from training.callbacks.base import Callback, Loop, Record
from training.config import TrainConfig
from training.trainer import Trainer

LANGUAGE = {
    "kind": "language",
    "dim": 16,
    "depth": 2,
    "vocab": 32,
    "max_length": 8,
    "block": {"mixer": {"name": "attention", "heads": 2}, "position": "rope"},
}
VISION = {
    "kind": "vision",
    "image_size": 8,
    "channels": 1,
    "classes": 3,
    "dim": 16,
    "depth": 1,
    "stem": {"name": "patch", "patch": 4},
    "block": {
        "norm": "layernorm",
        "mixer": {"name": "attention", "heads": 2},
        "position": "learned",
        "feedforward": "mlp",
    },
}


class Items:
    """Map-style data from a list."""

    def __init__(self, items: list[dict[str, Tensor]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


class Letters:
    """A tokenizer of 32 ids, of which id i stands for 1 + i mod 3 bytes."""

    vocab_size, end = 32, 0

    def token_bytes(self) -> list[int]:
        return [0] + [1 + i % 3 for i in range(1, 32)]


def sentences(count: int, seed: int, length: int = 8) -> Items:
    """Sequences in which each token is the one before plus 1 or 3, so that there is a rule."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        moves = torch.randint(0, 2, (length,), generator=generator) * 2 + 1
        start = torch.randint(1, 32, (1,), generator=generator)
        ids = torch.cat([start, start + moves.cumsum(0)]) % 31 + 1
        targets = ids[1:].clone()
        targets[int(torch.randint(0, length, (), generator=generator))] = -100
        items.append({"tokens": ids[:-1], "targets": targets})
    return Items(items)


def pictures(count: int, seed: int) -> Items:
    """Images whose class is which third of the rows is bright."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for i in range(count):
        image = torch.randn(1, 8, 8, generator=generator)
        image[:, 2 * (i % 3) : 2 * (i % 3) + 3] += 2.0
        items.append({"images": image, "targets": torch.tensor(i % 3)})
    return Items(items)


def language_data(train: int = 64, validation: int = 11) -> Data:
    return Data("language", sentences(train, 0), sentences(validation, 1), tokenizer=Letters())


def vision_data(train: int = 48, validation: int = 10) -> Data:
    return Data(
        "vision",
        pictures(train, 0),
        pictures(validation, 1),
        classes=["a", "b", "c"],
        image_shape=(1, 8, 8),
    )


def make_model(config: dict[str, Any] = LANGUAGE) -> nn.Module:
    with torch.device("meta"):
        return build_model(config)


def make_engine(**layout: Any) -> NativeEngine:
    """This process's engine, in the world that it is in."""
    joined = torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if joined else 1
    rank = torch.distributed.get_rank() if joined else 0
    config = parse(ParallelConfig, layout)
    return NativeEngine(Layout.of(config, world, rank), torch.device("cpu"), config)


def make_trainer(
    data: Data | None = None,
    model: dict[str, Any] | None = None,
    engine: Any = None,
    **options: Any,
) -> Trainer:
    """A trainer of the tiny model; options of `TrainConfig` and of `Trainer` mixed."""
    data = data or language_data()
    own = {k: options.pop(k) for k in ("folder", "checkpoint", "callbacks", "seed") if k in options}
    config = parse(TrainConfig, {"steps": 10, "global_batch": 8, **options})
    model = model or (LANGUAGE if data.kind == "language" else VISION)
    return Trainer(config, engine or make_engine(), make_model(model), data, **own)


class Losses(Callback):
    """A collector of records."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def step(self, trainer: Loop, record: Record | None) -> None:
        if record is not None:
            self.records.append(record)

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]
