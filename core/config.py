"""Typed configs: YAML with line numbers, dotted overrides, one clear line for every mistake.

A config model is a `Config` subclass. `load` reads a YAML file, applies overrides and validates;
every mistake comes out as a `UserError` that names the file, the line, the key and the nearest
valid name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from core.errors import UserError, hint

Path_ = tuple[str | int, ...]
C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every config model: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = [f.alias or name for name, f in cls.model_fields.items()]
            for key in data:
                if key not in known:
                    raise unknown_key(str(key), known)
        return data

    def dump(self) -> dict[str, Any]:
        """Plain data that `parse` turns back into an equal config."""
        return self.model_dump(mode="json", by_alias=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self).model_validate({**self.dump(), **changes})


def unknown_key(key: str, known: Iterable[str]) -> PydanticCustomError:
    """The validation error for a key that a config does not have."""
    return PydanticCustomError(
        "unknown_key", "unknown key '{key}'{hint}", {"key": key, "hint": hint(key, known)}
    )


def nested(error: ValidationError) -> PydanticCustomError:
    """Carries a validation error out of a validator without losing where it happened."""
    return PydanticCustomError("nested", "{message}", {"message": str(error), "inner": error})


@dataclass
class Source:
    """Where a config's values came from, so that an error can point there."""

    name: str = "config"
    lines: dict[Path_, int] = field(default_factory=dict)
    overridden: set[Path_] = field(default_factory=set)

    def locate(self, path: Path_) -> str:
        """`file:line` of the deepest known ancestor of `path`, or the command line."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return "command line"
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return self.name


def parse(model: type[C], data: Any, source: Source | None = None) -> C:
    """Validate plain data.

    Raises:
        UserError: with the place, the key and what is wrong, for the first mistake found.
    """
    source = source or Source()
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(describe(error, source)) from None


def describe(error: ValidationError, source: Source) -> str:
    """One line for the first mistake of a validation error."""
    path, detail = _deepest((), error)
    context = detail.get("ctx") or {}
    if detail["type"] == "unknown_key":
        path = (*path, context["key"])
        message = detail["msg"]
    elif detail["type"] == "missing":
        message = "this key is required"
    elif detail["type"] in ("value_error", "slot"):
        message = detail["msg"].removeprefix("Value error, ")
    else:
        message = f"{detail['msg'][0].lower()}{detail['msg'][1:]} (got {_short(detail['input'])})"
    key = ".".join(str(part) for part in path) or "the config"
    return f"{source.locate(path)}: {key}: {message}"


def _deepest(prefix: Path_, error: ValidationError) -> tuple[Path_, ErrorDetails]:
    """Follow nested validation errors down to the first real one."""
    detail = error.errors(include_url=False)[0]
    path = (*prefix, *detail["loc"])
    inner = (detail.get("ctx") or {}).get("inner")
    return _deepest(path, inner) if isinstance(inner, ValidationError) else (path, detail)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def load(model: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read, override and validate a YAML config; raises UserError for any mistake."""
    data, source = read_yaml(path)
    apply_overrides(data, overrides, source)
    return parse(model, data, source)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Source]:
    """A YAML mapping and the line of every key in it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf8")
    except FileNotFoundError:
        folder = path.parent
        siblings = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
        raise UserError(f"{path}: no such file{hint(path.name, siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    source = Source(str(path))
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _note_lines(node, (), source.lines, path)
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    return data, source


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `3e-4` as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _note_lines(node: yaml.Node, at: Path_, lines: dict[Path_, int], file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise UserError(f"{file}:{key.start_mark.line + 1}: '{key.value}' is given twice")
            seen.add(key.value)
            lines[(*at, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*at, key.value), lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _note_lines(value, (*at, index), lines, file)


def apply_overrides(
    data: dict[str, Any], overrides: Sequence[str], source: Source | None = None
) -> None:
    """Apply `key.sub=value` items to plain data in place; values are read as YAML.

    A bare name on the way (`mixer: attention`, overridden by `mixer.heads=4`) stands for
    `{name: attention}`.
    """
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"override '{item}': write it as key.sub=value")
        try:
            value = yaml.load(text, Loader=_Loader) if text else None
        except yaml.YAMLError:
            value = text
        path = tuple(int(p) if p.isdigit() else p for p in key.split("."))
        _set(data, path, value, item)
        if source is not None:
            source.overridden.add(path)


def _set(data: Any, path: Path_, value: Any, item: str) -> None:
    head, *rest = path
    if isinstance(data, list):
        if not isinstance(head, int) or head >= len(data):
            raise UserError(f"override '{item}': '{head}' is not an index below {len(data)}")
        held = data[head]
    elif isinstance(data, dict):
        held = data.get(str(head))
        head = str(head)
    else:
        raise UserError(f"override '{item}': there is nothing to set below a plain value")
    if not rest:
        data[head] = value
        return
    if held is None:
        held = {}
    elif isinstance(held, str):
        held = {"name": held}
    data[head] = held
    _set(held, tuple(rest), value, item)
