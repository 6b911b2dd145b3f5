"""What must hold between the sections of a run's config, said before a run starts.

Each section checks itself; here stand the combinations, each mistake with its file and line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from core.config import Config, Path_, Source
from core.errors import UserError
from core.registry import PartConfig
from data_pipeline.data import Data
from launcher.config import RunConfig
from model.language import LanguageConfig
from parallel.context import tokens_unit
from parallel.schedules import check_halves, check_micro_batches


def wrong(source: Source, key: str, message: str) -> UserError:
    """The error for one key, where the config gives it."""
    return UserError(f"{source.locate(tuple(key.split('.')))}: {key}: {message}")


def check(config: RunConfig, source: Source) -> None:
    """Everything that can be judged without opening the data.

    Raises:
        UserError: for the first combination that cannot work.
    """
    _abilities(config, source)
    model = config.model
    if isinstance(model, LanguageConfig):
        limit = model.max_length
        if limit != "from_data" and config.data.sequence > limit:
            raise wrong(
                source,
                "data.sequence",
                f"{config.data.sequence} tokens do not fit model.max_length ({limit}); "
                f"lower the one or raise the other",
            )
        parallel = config.parallel
        shares = parallel.tp if parallel.sequence_parallel else 1
        unit = tokens_unit(parallel.cp, shares) if parallel.cp > 1 else 1
        if config.data.sequence % unit:
            raise wrong(
                source,
                "data.sequence",
                f"parallel.cp: {parallel.cp} divides tokens in multiples of {unit}, which "
                f"{config.data.sequence} is not; use {-(-config.data.sequence // unit) * unit}",
            )


def check_batch(config: RunConfig, source: Source, data_size: int) -> None:
    """The global batch divides evenly over the data ranks and their micro-batches.

    Raises:
        UserError: naming the nearest batch that does.
    """
    train = config.train
    micro = 1 if train.micro_batch == "auto" else train.micro_batch
    unit = data_size * micro
    if train.global_batch % unit:
        works = max(1, round(train.global_batch / unit)) * unit
        parts = f"{data_size} data ranks" + (f" × micro-batch {micro}" if micro > 1 else "")
        raise wrong(
            source,
            "train.global_batch",
            f"{train.global_batch} is not a multiple of {unit} ({parts}); "
            f"the nearest that works is {works}",
        )
    check_pipeline(config, data_size)


def check_pipeline(config: RunConfig, data_size: int) -> None:
    """The schedule can run the step's micro-batches, and what else is asked of the backward pass.

    Raises:
        UserError: proposing what works.
    """
    train, samples = config.train, config.train.global_batch // data_size
    micro = samples if train.micro_batch == "auto" else train.micro_batch
    check_micro_batches(config.parallel, samples // micro, samples)
    check_halves(config.parallel, recompute=train.recompute, compile=train.compile)


def resolve(config: RunConfig, source: Source, data: Data) -> RunConfig:
    """The config with what the data decides filled in: vocabulary, lengths, sizes, classes.

    Raises:
        UserError: the data does not fit what the config says.
    """
    model = config.model
    if isinstance(model, LanguageConfig):
        assert data.tokenizer is not None
        size = data.tokenizer.vocab_size
        if model.vocab != "from_tokenizer" and model.vocab < size:
            raise wrong(
                source,
                "model.vocab",
                f"{model.vocab} is too small for the tokenizer's {size} ids; set it to at least "
                f"{size}, or to from_tokenizer",
            )
        changes: dict[str, Any] = {}
        if model.vocab == "from_tokenizer":
            changes["vocab"] = size
        if model.max_length == "from_data":
            changes["max_length"] = config.data.sequence
    else:
        assert data.image_shape is not None
        channels, height, width = data.image_shape
        found = {
            "image_size": height if height == width else (height, width),
            "channels": channels,
            "classes": len(data.classes),
        }
        for key, value in found.items():
            held = getattr(model, key)
            same = held in ("from_data", None, value) or held == (height, width)
            if not same and not (key == "classes" and held > value):
                raise wrong(
                    source,
                    f"model.{key}",
                    f"{held} does not fit the data's {value}; set it to from_data",
                )
        changes = {k: v for k, v in found.items() if getattr(model, k) == "from_data"}
    return config.model_copy(update={"model": model.replace(**changes)})


def parts(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, PartConfig]]:
    """Every part inside a config, with its path."""
    if isinstance(value, PartConfig):
        yield path, value
    if isinstance(value, Config):
        for name in type(value).model_fields:
            yield from parts(getattr(value, name), (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from parts(item, (*path, index))


def _abilities(config: RunConfig, source: Source) -> None:
    """No part is asked for what it declares that it cannot do."""
    asked = dict(_asked(config))
    for path, part in parts(config.model, ("model",)):
        for ability, reason in part.entry.cannot.items():
            if ability in asked:
                key = ".".join(str(p) for p in path)
                raise wrong(
                    source,
                    key,
                    f"{part.entry.slot} '{part.name}' cannot do {asked[ability]}: {reason}",
                )


def _asked(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What a run needs of its parts, in the words of contracts, and what says so.

    What the layout needs of them is `parallel.check`'s.
    """
    model = config.model
    yield model.kind, f"{model.kind} models (model.kind)"
    if isinstance(model, LanguageConfig) and model.architecture == "decoder":
        yield "decoder", "decoders (model.architecture)"
        yield "causal", "causal models (model.architecture: decoder)"
    if isinstance(model, LanguageConfig) and config.data.documents == "masked":
        yield "documents", "packed documents (data.documents: masked)"
    if config.train.precision == "bf16":
        yield "bfloat16", "train.precision: bf16"
