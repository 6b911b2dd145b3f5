"""The command's surface: help that is instant and complete, and what the light commands print."""

import json
import subprocess
import sys
import time

import pytest

from launcher.cli import call
from tests.launcher.command import ROOT

COMMANDS = ["train", "resume", "generate", "eval", "zoo", "checkpoint", "data", "doctor", "schema"]


def test_help_names_every_command(capsys):
    assert call(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)


def test_help_takes_less_than_half_a_second():
    """The best of three, for the machine may be busy."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "launcher.cli", "--help"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5


def test_the_command_imports_nothing_heavy():
    code = "import sys, launcher.cli; print([m for m in ('torch', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_train_help_documents_every_key(capsys):
    from launcher.config import RunConfig

    assert call(["train", "--help"]) == 0
    shown = capsys.readouterr().out

    def keys(schema, definitions):
        for name, field in schema.get("properties", {}).items():
            reference = field.get("$ref", "").rpartition("/")[2]
            inner = list(keys(definitions[reference], definitions)) if reference else []
            yield from ([f"{name}.{key}" for key in inner] or [name])

    schema = RunConfig.model_json_schema(by_alias=True)
    found = list(keys(schema, schema["$defs"]))
    assert len(found) > 40
    assert [key for key in found if key != "model" and f"\n  {key}: " not in shown] == []
    assert "  train.steps: int > 0 = 300\n      Optimizer steps of the whole run.\n" in shown
    assert "  model.block.placement: a placement: " in shown
    assert "  checkpoint.async: true or false = true" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    assert call([command, "--help"]) == 0
    assert "Usage: manyforms" in capsys.readouterr().out


def test_without_words_the_help_is_shown(capsys):
    assert call([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_doctor_says_what_is_there_and_what_an_absent_package_would_bring(capsys, monkeypatch):
    from importlib import metadata

    known = metadata.version

    def version(name):
        if name == "lm-eval":
            return "0.4.9"
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    assert call(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["lm-eval", "0.4.9:"] for line in lines)
    (absent,) = [line for line in lines if line.split()[:1] == ["deepspeed"]]
    assert "not installed" in absent and "pip install 'manyforms[deepspeed]'" in absent
    first_words = {line.split()[0] for line in lines if line.startswith("  ")}
    assert first_words >= {"python", "torch", "processors", "memory", "disk", "NCCL", "gloo"}


def test_zoo_lists_every_slot(capsys):
    from core.registry import names, slots

    assert call(["zoo"]) == 0
    shown = capsys.readouterr().out
    assert all(slot in shown for slot in slots())
    assert all(name in shown for name in names("norm"))


def test_zoo_json(capsys):
    assert call(["zoo", "--json"]) == 0
    entries = {(e["slot"], e["name"]): e for e in json.loads(capsys.readouterr().out)}
    rope = entries["position", "rope"]
    assert rope["paper"] == "2104.09864" and rope["title"]
    heads = next(o for o in entries["mixer", "attention"]["options"] if o["name"] == "heads")
    assert heads == {"name": "heads", "type": "int > 0", "default": "8", "text": "query heads."}
    assert "grouped_query" in entries["mixer", "attention"]["aliases"]


def test_zoo_show_documents_every_option(capsys):
    from core.registry import get

    assert call(["zoo", "show", "grouped_query"]) == 0
    shown = capsys.readouterr().out
    assert "https://arxiv.org/abs/1706.03762" in shown
    options = set(get("mixer", "attention").config.model_fields) - {"name"}
    assert all(f"\n  {option}: " in shown for option in options)
    assert "  dropout: float >= 0 and < 1 = 0.0\n" in shown


def test_zoo_show_says_what_a_mechanism_cannot_do_and_why(capsys):
    from core.registry import entries

    entry = next(entry for entry in entries("position") if entry.cannot)
    assert call(["zoo", "show", f"{entry.slot}:{entry.name}"]) == 0
    shown = capsys.readouterr().out
    for contract, reason in entry.cannot.items():
        assert f"  {contract}: {reason}" in shown
