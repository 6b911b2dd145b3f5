"""The run config: round trips, published models, plugins, the schema."""

import json
import shutil

import pytest
import yaml

from core.registry import entries
from launcher.checks import resolve
from launcher.config import load_run, read_run, write_run
from launcher.schema import run_schema
from tests.launcher.command import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

PLUGIN = """\
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from core.registry import register
from model.leaves import NormVector


@register("norm", "outsider")
class Outsider(nn.Module):
    '''A gain and nothing else.

    Args:
        boost: multiplies it.
    '''

    def __init__(self, dim: int, *, boost: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__()
        self.gain, self.boost = NormVector(dim), boost

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.gain() * self.boost
"""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_their_headers_give_the_command(recipe):
    assert load_run(recipe).run.name == recipe.stem
    header = recipe.read_text().split("\n\n")[0]
    assert f"manyforms train configs/{recipe.name}" in header


def test_the_written_config_is_the_same_config(tiny, tmp_path):
    config = load_run(tiny, ["train.optimizer=muon", "train.optimizer.lr=0.5"])
    write_run(config, tmp_path)
    assert load_run(tmp_path / "config.yaml") == config
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["train"]["optimizer"]["lr"] == 0.5
    assert written["train"]["optimizer"]["momentum"] == 0.95  # resolved: every default is there


def test_the_data_decides_what_is_left_to_it(tiny):
    from data_pipeline.open import open_data

    config, source = read_run(tiny)
    data = open_data(config.data, "language", 0)
    resolved = resolve(config, source, data)
    assert (resolved.model.vocab, resolved.model.max_length) == (data.tokenizer.vocab_size, 16)
    assert resolve(resolved, source, data) == resolved


def test_an_override_of_an_option_keeps_the_default_part(tiny):
    config = load_run(tiny, ["train.optimizer.lr=0.5", "model.init.std=0.1"])
    assert (config.train.optimizer.name, config.train.optimizer.lr) == ("adamw", 0.5)
    assert (config.model.init.name, config.model.init.std) == ("normal", 0.1)


def test_name_and_folder_follow_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 5}\n")
    config = load_run(path)
    assert (config.run.name, config.run.dir) == ("mine", "runs/mine")


def test_a_published_model_by_name_with_changes(tmp_path):
    name = entries("model")[0].name
    published = entries("model")[0].target()
    path = tmp_path / "published.yaml"
    path.write_text(f"model: {{name: {name}, classes: 7}}\n")
    config = load_run(path)
    assert config.model.classes == 7
    assert config.model.dump()["block"] == type(config.model)(**published).dump()["block"]


def test_plugin_file_beside_the_config(tiny, tmp_path):
    (tmp_path / "outsider.py").write_text(PLUGIN)
    tiny.write_text(tiny.read_text() + "plugins: [outsider.py]\n")
    config = load_run(tiny, ["model.block.norm={name: outsider, boost: 2.0}"])
    assert config.model.block[0].norm.boost == 2.0
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(config, folder)
    (tmp_path / "outsider.py").unlink()  # the run has its own copy, wherever it is moved
    shutil.move(folder, tmp_path / "moved")
    assert load_run(tmp_path / "moved" / "config.yaml").model == config.model


def test_plugin_option_out_of_bounds(tiny, tmp_path):
    from core.errors import UserError

    (tmp_path / "outsider.py").write_text(PLUGIN)
    tiny.write_text(tiny.read_text() + "plugins: [outsider.py]\n")
    with pytest.raises(UserError, match=r"model\.block\.0\.norm\.boost: .*greater than 0"):
        load_run(tiny, ["model.block.norm={name: outsider, boost: -1}"])


def test_installed_packages_bring_mechanisms(monkeypatch):
    from importlib import metadata

    from launcher.plugins import ENTRY_POINTS, load_installed_mechanisms

    loaded = []

    class Point:
        name, value = "theirs", "their.module"

        def load(self):
            loaded.append(self.value)

    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [Point()] if group == ENTRY_POINTS else []
    )
    load_installed_mechanisms()
    assert loaded == ["their.module"]


def test_schema_is_json_and_its_references_resolve():
    schema = json.loads(json.dumps(run_schema()))

    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    found = set(references(schema))
    assert "#/$defs/slot.mixer" in found and "#/$defs/slot.optimizer" in found
    assert {ref.removeprefix("#/$defs/") for ref in found} <= set(schema["$defs"])


def test_schema_knows_the_options_of_every_part():
    shared = run_schema()["$defs"]
    for entry in entries("mixer"):
        (part,) = [
            p for p in shared["slot.mixer"]["anyOf"]
            if entry.name in p.get("properties", {}).get("name", {}).get("enum", [])
        ]  # fmt: skip
        assert set(part["properties"]) == set(entry.config.model_fields)
        assert part["additionalProperties"] is False
