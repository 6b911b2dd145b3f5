"""`manyforms data`: look at data, build shards of it, train a tokenizer on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.config import Source, apply_overrides
from core.registry import PartConfig
from data_pipeline.config import WeightedSource
from data_pipeline.data import Data, Kind
from data_pipeline.inspect import describe
from data_pipeline.open import open_data
from data_pipeline.pack import pack as pack_source
from launcher.checkpoints import size
from launcher.config import RunConfig, load_run, parse_run


def read(what: str, overrides: Sequence[str]) -> RunConfig:
    """The run config in a YAML file, or one for a source given by name or path."""
    if what.endswith((".yaml", ".yml")):
        return load_run(what, overrides)
    source = Source("command line")
    data: dict[str, object] = {"data": {"sources": [what]}}
    apply_overrides(data, overrides, source)
    config = parse_run(data, source, Path("data.yaml"))
    if "model.kind" in {item.partition("=")[0] for item in overrides}:
        return config
    if all(kind_of(item) == "vision" for item in config.data.sources):
        data["model"] = {"kind": "vision"}
        config = parse_run(data, source, Path("data.yaml"))
    return config


def kind_of(item: WeightedSource) -> Kind:
    """Whether a source holds text or images; one that can hold both is taken for text."""
    target = item.part.entry.target if isinstance(item.part, PartConfig) else type(item.part)
    return "language" if hasattr(target, "documents") else "vision"


def _open(config: RunConfig) -> Data:
    return open_data(config.data, config.model.kind, config.run.seed)


def inspect(what: str, overrides: Sequence[str]) -> None:
    """Print counts, the split and a sample."""
    print("\n".join(describe(_open(read(what, overrides)))))


def pack(what: str, folder: Path, overrides: Sequence[str], samples: int, megabytes: float) -> None:
    """Write each source as WebDataset shards; several sources get a folder each."""
    config = read(what, overrides)
    several = len(config.data.sources) > 1
    for number, item in enumerate(config.data.sources):
        place = folder / f"{number}-{item.name}" if several else folder
        written = pack_source(item, config.model.kind, place, samples, megabytes)
        total = sum(path.stat().st_size for path in written)
        print(f"{place}: {len(written)} shards, {size(total)}, from {item.name}")


def tokenizer(what: str, folder: Path, overrides: Sequence[str], text: str | None) -> None:
    """Train the tokenizer, save it and say how well it cuts the held-out text."""
    config = read(what, overrides)
    trained = _open(config).tokenizer
    if trained is None:
        from core.errors import UserError

        raise UserError(f"{what}: images have no tokenizer; name a source of text")
    trained.save(folder)
    print(f"{folder}: {trained.name}, {trained.vocab_size:,} ids")
    if text is not None:
        pieces = [trained.decode([index]) for index in trained.encode(text)]
        print(" | ".join(pieces))
