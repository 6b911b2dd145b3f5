"""`manyforms schema`: the run config as JSON schema, for editors that complete and check YAML.

Pydantic writes the sections; this adds what it cannot know: the options of each registered part,
and the shorthands that the config reads (a part's bare name, one block for a list of one).
"""

from __future__ import annotations

from typing import Any

from core.registry import Slot, entries, slots
from launcher.config import RunConfig

Schema = dict[str, Any]
_ONE_OR_MANY = ("block", "encoder_block", "sources")


def run_schema() -> Schema:
    """The JSON schema of a run config."""
    schema: Schema = RunConfig.model_json_schema(by_alias=True)
    shared: Schema = schema.setdefault("$defs", {})
    choices = {slot: _choices(slot) for slot in slots()}
    for slot in choices:
        shared[f"slot.{slot}"] = _slot(slot, shared)
    _refer(schema, choices)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Manyforms run",
    }


def _choices(slot: str) -> Any:
    """How `Slot` writes a choice, by which it is found again."""
    return Slot(slot).__get_pydantic_json_schema__(None, None)["anyOf"]


def _slot(slot: str, shared: Schema) -> Schema:
    """A slot: any of its names, or one of its parts with options."""
    known = entries(slot)
    bare = sorted(name for entry in known for name in (entry.name, *entry.aliases))
    parts = []
    for entry in known:
        part = entry.config.model_json_schema(by_alias=True)
        shared.update(part.pop("$defs", {}))
        spellings = [entry.name, *entry.aliases]
        part["properties"]["name"] = {"enum": spellings, "description": entry.title or ""}
        part["required"] = sorted({*part.get("required", []), "name"})
        part["description"] = entry.summary
        parts.append(part)
    return {"description": f"a {slot}, by name or with options", "anyOf": [{"enum": bare}, *parts]}


def _refer(node: Any, choices: Schema) -> None:
    """Replace every bare choice of names by a reference to the slot, in place."""
    if isinstance(node, list):
        for item in node:
            _refer(item, choices)
    elif isinstance(node, dict):
        for slot, choice in choices.items():
            if node.get("anyOf") == choice:
                node["anyOf"] = [{"$ref": f"#/$defs/slot.{slot}"}, {"type": "null"}]
                if node.get("default", "") is not None:
                    node["anyOf"].pop()
        for key, child in node.items():
            if key == "properties":
                for name in _ONE_OR_MANY:
                    if name in child:
                        child[name] = _also_one(child[name])
            _refer(child, choices)


def _also_one(field: Schema) -> Schema:
    """A list that may be written as its only item."""
    kept: Schema = {key: field[key] for key in ("description", "default") if key in field}
    whole = {key: value for key, value in field.items() if key not in kept}
    variants = whole.get("anyOf", [whole])
    items = [variant["items"] for variant in variants if "items" in variant]
    return {**kept, "anyOf": [*variants, *items]}
