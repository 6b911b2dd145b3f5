"""`manyforms zoo`: what is registered, and what is proven about it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import data_pipeline
import model
import training
from core.config import Config
from core.errors import UserError, hint
from core.registry import Entry, PartConfig, entries, slots
from launcher.options import part_options
from model.context import told

Proofs = dict[str, dict[str, str]]
PROOFS = Path(__file__).parent.parent / "docs" / "contracts.json"
ROOMS = (model, data_pipeline, training)
"""Importing a room declares its slots."""


def load_proofs(path: Path = PROOFS) -> Proofs:
    """What the contract tests found: "slot:name" → contract → "proven", "declared: why", ….

    Empty where they have not been run.
    """
    try:
        proofs: Proofs = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; run the contract tests again") from None
    return proofs


def as_json() -> list[dict[str, Any]]:
    """Every entry as plain data."""
    proofs = load_proofs()
    return [_entry_json(entry, proofs.get(f"{entry.slot}:{entry.name}", {})) for entry in entries()]


def _entry_json(entry: Entry, proven: dict[str, str]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "slot": entry.slot,
        "paper": entry.paper,
        "title": entry.title,
        "summary": entry.summary,
        "options": [
            {"name": o.key, "type": o.type, "default": o.default, "text": o.text}
            for o in part_options(entry)
        ],
        "proven": sorted(name for name, status in proven.items() if status == "proven"),
        "failed": {name: s for name, s in proven.items() if s.startswith("failed")},
        "cannot": dict(entry.cannot),
    }


def print_list(console: Console) -> None:
    """A table per slot."""
    for slot in slots():
        table = Table(title=f"{slot}", title_justify="left", title_style="bold", expand=False)
        for heading in ("name", "source", "paper"):
            table.add_column(heading, overflow="fold")
        for entry in entries(slot):
            also = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
            table.add_row(entry.name + also, entry.title or entry.summary, entry.paper or "")
        console.print(table)


def print_matrix(console: Console) -> None:
    """What is proven of each mechanism: a row each, a column per contract.

    Raises:
        UserError: the contract tests have not been run.
    """
    proofs = load_proofs()
    if not proofs:
        raise UserError(f"{PROOFS}: no such file; the contract tests write it: make test")
    contracts = sorted({contract for found in proofs.values() for contract in found})
    table = Table(caption="✓ proven   – declared impossible, with a reason   ✗ failed")
    table.add_column("mechanism", no_wrap=True)
    for contract in contracts:
        table.add_column(contract)
    marks = {"proven": "✓", "declared": "–", "failed": "✗"}
    for name, found in sorted(proofs.items()):
        cells = [marks.get(found.get(contract, "").split(":")[0], "") for contract in contracts]
        table.add_row(name, *cells)
    console.print(table)


def show(name: str) -> str:
    """All there is to know about the mechanisms called `name`, which may stand in several slots.

    Raises:
        UserError: nothing is called so.
    """
    slot, _, bare = name.rpartition(":")
    known = entries()
    found = [e for e in known if bare in (e.name, *e.aliases) and slot in ("", e.slot)]
    if not found:
        every = {spelled for e in known for spelled in (e.name, *e.aliases)}
        raise UserError(f"nothing in the zoo is called '{name}'{hint(bare, every)}")
    proofs = load_proofs()
    return "\n\n".join(_page(e, proofs.get(f"{e.slot}:{e.name}", {})) for e in found)


def _page(entry: Entry, proven: dict[str, str]) -> str:
    lines = [f"{entry.name} ({entry.slot})"]
    if entry.aliases:
        lines.append(f"also: {', '.join(entry.aliases)}")
    if entry.title:
        lines.append(f"source: {entry.title}")
    if entry.paper:
        lines.append(f"paper: https://arxiv.org/abs/{entry.paper}")
    lines += ["", _prose(entry)]
    if entry.slot == "model":
        published = entry.target()
        lines += ["", "config:", *(f"  {key}: {_flow(value)}" for key, value in published.items())]
    options = part_options(entry)
    lines += ["", "options:" if options else "no options"]
    for option in options:
        lines.append(f"  {option.line}")
        if option.text:
            lines.append(f"      {option.text}")
    if entry.slot in ("mixer", "feedforward") and "language" not in entry.cannot:
        lines += ["", f"under context parallelism: {told(entry.slot, entry.target)}"]
    if entry.cannot:
        lines += ["", "cannot:", *(f"  {what}: {why}" for what, why in entry.cannot.items())]
    if proven:
        shown = sorted(name for name, status in proven.items() if status == "proven")
        lines += ["", f"proven: {', '.join(shown) or 'nothing yet'}"]
    return "\n".join(lines)


def _prose(entry: Entry) -> str:
    """The docstring up to its sections, which repeat the options or are for programmers."""
    text = inspect.getdoc(entry.target) or ""
    for heading in ("\nArgs:", "\nRaises:", "\nReturns:", "\nAttributes:"):
        text = text.split(heading)[0]
    return text.strip()


def _flow(value: Any) -> Any:
    """A config value on one line."""
    if isinstance(value, PartConfig | Config):
        value = value.dump()
    return json.dumps(value, default=str) if isinstance(value, dict | list) else value
