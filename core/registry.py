"""The registry: every part that a config chooses by name.

A part is registered under a slot and a name, by decorating a class or a function:

    @register("norm", "rmsnorm", paper="1910.07467", title="Root Mean Square Layer Normalization")
    class RMSNorm(nn.Module):
        def __init__(self, dim: int, *, eps: float = 1e-6): ...

The signature is the single source of truth. Parameters before the `*` are structural: whoever
builds the part supplies them by name (`dim`, `layer`, `causal`, …). Parameters after it are the
user's options; from them the registry derives the part's config model, so a config is checked,
documented and exported to JSON schema without a second list of options; the docstring's `Args:`
describes them, and bounds are written as `Annotated[int, Field(gt=0)]`. The class stays an ordinary
class: `RMSNorm(256, eps=1e-5)` works in anybody's code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

from pydantic import Field, ValidationError, create_model
from pydantic_core import PydanticCustomError, core_schema

from core.config import Config, Source, describe, nested
from core.errors import UserError, hint
from core.hashing import file_digest

T = TypeVar("T", bound=Callable[..., Any])


class PartConfig(Config):
    """A part chosen by name, with its options. `build` makes the part."""

    name: str
    entry: ClassVar[Entry]  # set on each derived model

    def build(self, **context: Any) -> Any:
        """Construct the part, taking from `context` the structural arguments it asks for."""
        return self.entry.construct(self, context)


@dataclass(frozen=True)
class Entry:
    """One registered part and what is known about it."""

    slot: str
    name: str
    target: Callable[..., Any]
    paper: str | None = None
    title: str | None = None
    aliases: tuple[str, ...] = ()
    cannot: dict[str, str] = field(default_factory=dict)
    structural: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    config: type[PartConfig] = PartConfig

    def construct(self, config: PartConfig, context: dict[str, Any]) -> Any:
        missing = [name for name in self.required if name not in context]
        if missing:
            raise TypeError(
                f"{self.slot} '{self.name}' needs {', '.join(missing)} from whoever builds it"
            )
        arguments = {name: context[name] for name in self.structural if name in context}
        options = {key: getattr(config, key) for key in type(config).model_fields if key != "name"}
        return self.target(**arguments, **options)

    @property
    def summary(self) -> str:
        """The first line of the part's docstring."""
        return (inspect.getdoc(self.target) or "").split("\n", 1)[0]


_entries: dict[str, dict[str, Entry]] = {}
_lookup: dict[str, dict[str, Entry]] = {}
_loaders: dict[str, tuple[str, ...]] = {}


def register(
    slot: str,
    name: str,
    *,
    paper: str | None = None,
    title: str | None = None,
    aliases: Iterable[str] = (),
    cannot: dict[str, str] | None = None,
) -> Callable[[T], T]:
    """Register a class or function under `slot` and `name`.

    Args:
        paper: the arXiv identifier of the source.
        title: the source's title.
        aliases: other names under which it is found.
        cannot: what it cannot do, each with the reason a reader accepts; the keys are contract
            names such as "tp" or "causal". The config check refuses those combinations.
    """

    def keep(target: T) -> T:
        entry = _derive(slot, name, target, paper, title, tuple(aliases), dict(cannot or {}))
        table = _lookup.setdefault(slot, {})
        for key in (name, *entry.aliases):
            held = table.get(key)
            if held is not None and _origin(held.target) != _origin(target):
                raise UserError(
                    f"{slot} '{key}' is registered twice: by {_origin(held.target)} and by "
                    f"{_origin(target)}; rename one"
                )
            table[key] = entry
        _entries.setdefault(slot, {})[name] = entry
        return target

    return keep


def _origin(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _derive(
    slot: str,
    name: str,
    target: Callable[..., Any],
    paper: str | None,
    title: str | None,
    aliases: tuple[str, ...],
    cannot: dict[str, str],
) -> Entry:
    """Read the options off the signature and make the config model."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(function, include_extras=True)
    texts = _argument_texts(inspect.getdoc(target) or "")
    structural, required, fields = [], [], {}
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{_origin(target)}: a registered part spells out its parameters")
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            kind = hints.get(parameter.name, Any)
            text = texts.get(parameter.name)
            if text is not None:
                kind = Annotated[kind, Field(description=text)]
            fields[parameter.name] = (kind, default)
        else:
            structural.append(parameter.name)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
    config = create_model(  # type: ignore[call-overload]
        f"{slot}:{name}", __base__=PartConfig, name=(str, name), **fields
    )
    entry = Entry(
        slot=slot,
        name=name,
        target=target,
        paper=paper,
        title=title,
        aliases=aliases,
        cannot=cannot,
        structural=tuple(structural),
        required=tuple(required),
        config=config,
    )
    config.entry = entry
    config.__doc__ = inspect.getdoc(target)
    return entry


def _argument_texts(docstring: str) -> dict[str, str]:
    """What a Google-style docstring's `Args:` section says of each parameter."""
    texts: dict[str, str] = {}
    inside, name = False, ""
    for line in docstring.splitlines():
        if line.rstrip() == "Args:":
            inside = True
        elif inside and line.strip() and not line.startswith("    "):
            break
        elif inside and (match := re.match(r"    (\w+): (.*)", line)):
            name, texts[match[1]] = match[1], match[2].strip()
        elif inside and name and line.strip():
            texts[name] += " " + line.strip()
    return texts


def load_from(slot: str, *packages: str) -> None:
    """Declare the packages whose modules register parts in `slot`; imported on first use."""
    _loaders[slot] = (*_loaders.get(slot, ()), *packages)


def _ensure(slot: str) -> None:
    for package in _loaders.pop(slot, ()):
        import_all(package)


def import_all(package: str) -> None:
    """Import a package and every module in it, so that adding a file is enough."""
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), package + "."):
        importlib.import_module(info.name)


def export(package: str, namespace: dict[str, Any]) -> None:
    """Give a package the names its modules register: `from model.norms import RMSNorm`."""
    import_all(package)
    for table in _entries.values():
        for entry in table.values():
            if entry.target.__module__.startswith(package + "."):
                namespace[entry.target.__name__] = entry.target


def slots() -> list[str]:
    """Every slot that has parts."""
    for slot in list(_loaders):
        _ensure(slot)
    return sorted(_entries)


def names(slot: str) -> list[str]:
    """The names registered in a slot, aliases left out."""
    _ensure(slot)
    return sorted(_entries.get(slot, {}))


def get(slot: str, name: str) -> Entry:
    """The entry of a name or alias; raises UserError with the nearest name."""
    _ensure(slot)
    table = _lookup.get(slot, {})
    if name not in table:
        raise UserError(f"unknown {slot} '{name}'{hint(name, table)}")
    return table[name]


def entries(slot: str | None = None) -> list[Entry]:
    """All entries, of one slot or of every slot, in order of slot and name."""
    chosen = [slot] if slot is not None else slots()
    return [get(s, name) for s in chosen for name in names(s)]


def resolve(slot: str, spec: Any) -> PartConfig:
    """A part's config from a name, a mapping with `name`, or a config."""
    if isinstance(spec, PartConfig):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise UserError(f"a {slot} is a name, or a mapping with 'name' and its options")
    entry = get(slot, spec["name"])
    return entry.config.model_validate({**spec, "name": entry.name})


def build(slot: str, spec: Any, **context: Any) -> Any:
    """Make a part from a name, a mapping or a config; anything already built passes through.

    Raises:
        UserError: for an unknown name or option.
    """
    if not isinstance(spec, str | dict | PartConfig):
        return spec
    try:
        return resolve(slot, spec).build(**context)
    except ValidationError as error:
        name = spec["name"] if isinstance(spec, dict) else spec
        raise UserError(describe(error, Source(f"{slot} '{name}'"))) from None


class Slot:
    """Marks a config field or an option as a part chosen by name.

    mixer: Annotated[Any, Slot("mixer")] = "attention"
    """

    def __init__(self, slot: str, optional: bool = False):
        self.slot = slot
        self.optional = optional

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.dump() if isinstance(value, PartConfig) else value
            ),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        known = names(self.slot)
        return {
            "description": f"a {self.slot}, by name or with options",
            "anyOf": [
                {"enum": known},
                {
                    "type": "object",
                    "properties": {"name": {"enum": known}},
                    "required": ["name"],
                },
            ],
        }

    def _parse(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if not isinstance(value, str | dict | PartConfig):
            if callable(value):
                return value  # an already built module, in library use
            raise PydanticCustomError(
                "slot", "{m}", {"m": f"a {self.slot} is a name, or a mapping with 'name'"}
            )
        try:
            return resolve(self.slot, value)
        except ValidationError as error:
            raise nested(error) from None
        except UserError as error:
            raise PydanticCustomError("slot", "{m}", {"m": str(error)}) from None


def load_plugin(reference: str) -> types.ModuleType:
    """Import a user's mechanisms from a Python file or a module name.

    Raises:
        UserError: if it cannot be found or fails to import.
    """
    path = Path(reference)
    try:
        if path.suffix != ".py":
            return importlib.import_module(reference)
        if not path.is_file():
            raise UserError(f"plugin {reference}: no such file")
        name = f"manyforms_plugin_{path.stem}_{file_digest(path)[:12]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:
        sys.modules.pop(locals().get("name", ""), None)
        raise UserError(f"plugin {reference}: {type(error).__name__}: {error}") from error
