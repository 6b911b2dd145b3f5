"""What data looks like, in lines of text."""

from __future__ import annotations

from typing import Any

from data_pipeline.data import Data

_SHOWN = 200  # characters of a sample


def describe(data: Data) -> list[str]:
    """Counts of every source and one sample, for people.

    For language: documents, tokens and bytes per token on each side; for vision: the shape, the
    normalisation and the images of each class.
    """
    return _language(data) if data.kind == "language" else _vision(data)


def _language(data: Data) -> list[str]:
    tokenizer = data.tokenizer
    assert tokenizer is not None
    lines = [f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids"]
    for name, facts in data.facts.items():
        lines.append(f"source {name} (held out by {facts['split']})")
        for side in ("train", "validation"):
            lines.append(f"  {side}: {_counts(facts[side])}")
    sample = data.train[0]
    lines.append(
        f"samples: {len(data.train):,} to train on, {len(data.validation):,} held out, "
        f"{len(sample['tokens']):,} tokens each"
    )
    text = tokenizer.decode(sample["tokens"].tolist())
    lines.append(f"the first: {text[:_SHOWN]!r}{'…' if len(text) > _SHOWN else ''}")
    return lines


def _counts(facts: dict[str, Any]) -> str:
    if not facts["documents"]:
        return "nothing"
    tokens = facts["tokens"] - facts["documents"]  # `end` stands for no text
    return (
        f"{facts['documents']:,} documents, {facts['bytes']:,} bytes, {facts['tokens']:,} tokens, "
        f"{facts['bytes'] / tokens:.3f} bytes per token"
    )


def _vision(data: Data) -> list[str]:
    assert data.image_shape is not None
    channels, height, width = data.image_shape
    mean, std = (", ".join(f"{v:.4f}" for v in data.facts[key]) for key in ("mean", "std"))
    lines = [
        f"images: {channels} channels, {height} × {width} pixels; mean {mean}, std {std}",
        f"samples: {len(data.train):,} to train on, {len(data.validation):,} held out",
    ]
    for name in data.classes:
        train, held = data.facts["train"][name], data.facts["validation"][name]
        lines.append(f"  class {name}: {train:,} to train on, {held:,} held out")
    sample = data.train[0]
    lines.append(f"the first (class {data.classes[int(sample['targets'])]}):")
    lines += _picture(sample["images"])
    return lines


def _picture(image: Any) -> list[str]:
    """An image as characters, dark to light, at most 32 wide."""
    shades = " .:-=+*#%@"
    grey = image.mean(dim=0)
    step = max(1, -(-grey.shape[1] // 32))
    grey = grey[::step, ::step]
    low, high = float(grey.min()), float(grey.max())
    levels = ((grey - low) / max(high - low, 1e-6) * (len(shades) - 1)).round().int()
    return ["  " + "".join(shades[level] * 2 for level in row) for row in levels.tolist()]
