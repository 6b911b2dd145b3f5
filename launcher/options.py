"""What can be written in a config, read off the config models themselves.

`manyforms train --help` and `manyforms zoo show NAME` print it, so there is no second list.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from core.config import Config
from core.registry import Entry, PartConfig, Slot, names


@dataclass(frozen=True)
class Option:
    """One key of a config."""

    key: str
    type: str
    default: str
    text: str

    @property
    def line(self) -> str:
        """`key: type = default`."""
        return f"{self.key}: {self.type}" + (f" = {self.default}" if self.default else "")


def options(model: type[Config], prefix: str = "") -> Iterator[Option]:
    """Every key of a config model, those of the sections below it included, in order."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = sections(field.annotation)
        for section in inner:
            yield from options(section, key + ".")
        if not inner:
            yield _option(key, field)


def part_options(entry: Entry) -> list[Option]:
    """The options of one registered part."""
    fields = entry.config.model_fields.items()
    return [_option(name, field) for name, field in fields if name != "name"]


def _option(key: str, field: FieldInfo) -> Option:
    kind = _type(field.annotation, field.metadata)
    return Option(key, kind, _default(field), " ".join((field.description or "").split()))


def sections(annotation: Any) -> list[type[Config]]:
    """The config models inside an annotation; a list of blocks counts as its block."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    return _plain(value)


def _plain(value: Any) -> str:
    """A value as YAML's flow style writes it."""
    if isinstance(value, PartConfig):
        return value.name
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return str(value)


def _type(annotation: Any, metadata: Any = ()) -> str:
    """An annotation in words: `int > 0 or null`, `one of a, b`, `a norm`."""
    slots = [item for item in metadata if isinstance(item, Slot)]
    if slots:
        article = "an" if slots[0].slot[0] in "aeiou" else "a"
        text = f"{article} {slots[0].slot}: {', '.join(names(slots[0].slot))}"
        return text + (" or null" if slots[0].optional else "")
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], [*inner[1:], *metadata])
    if origin in (Union, types.UnionType):
        parts = [_type(part) for part in inner if part is not type(None)]
        parts += ["null"] if type(None) in inner else []
        bounds = _bounds(metadata)  # bounds of the whole apply to the number in it
        return " or ".join([parts[0] + bounds, *parts[1:]])
    if origin is Literal:
        return "one of " + ", ".join(_plain(value) for value in inner) if inner[1:] else inner[0]
    if origin in (list, tuple):
        item = _type(inner[0]) if inner else "anything"
        return f"list of {item}"
    if origin is dict:
        return "mapping"
    simple: dict[Any, str] = {
        bool: "true or false",
        str: "text",
        type(None): "null",
        Any: "anything",
    }
    name = simple.get(annotation) or str(getattr(annotation, "__name__", annotation))
    return name + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    """` > 0, < 1` from pydantic's constraints."""
    signs = [(at.Gt, "gt", ">"), (at.Ge, "ge", ">="), (at.Lt, "lt", "<"), (at.Le, "le", "<=")]
    flat: list[Any] = []
    for item in metadata:
        flat += item.metadata if isinstance(item, FieldInfo) else [item]
    found = [
        f"{sign} {getattr(item, name)}"
        for item in flat
        for kind, name, sign in signs
        if isinstance(item, kind)
    ]
    return " " + " and ".join(found) if found else ""
