"""The run config: the rooms' sections composed into one, and what must hold between them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError

from checkpoints.config import CheckpointConfig
from core.config import Config, Source, apply_overrides, nested, parse, read_yaml
from core.errors import UserError
from core.registry import get
from data_pipeline.config import DataConfig
from launcher.defaults import fill_names
from launcher.plugins import load_plugins
from model.language import LanguageConfig
from model.vision import VisionConfig
from model.zoo import config_class
from parallel.config import ParallelConfig
from training.config import TrainConfig


class RunSection(Config):
    """What the run is called, where it writes and which seed names its randomness."""

    name: str | None = None
    """What the run is called; the config's file name if not given."""
    dir: str | None = None
    """The run's folder; runs/<name> if not given."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Names the initial weights, the order of the data and every random choice."""


class RunConfig(Config):
    """Everything about a run."""

    run: RunSection = RunSection()
    model: LanguageConfig | VisionConfig = LanguageConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    plugins: list[str] = []
    """Python files or modules with mechanisms of your own; files are sought beside the config."""

    @field_validator("model", mode="wrap")
    @classmethod
    def _by_kind(cls, value: Any, _: ValidatorFunctionWrapHandler) -> Any:
        """Validate by `kind`, after filling in a published model that `name` stands for."""
        if isinstance(value, Config):
            return value
        try:
            if isinstance(value, str):
                value = {"name": value}
            if not isinstance(value, dict):
                raise UserError("the model is a mapping of keys, or a published model's name")
            if "name" in value:
                published = get("model", str(value["name"])).target()
                value = {**published, **{k: v for k, v in value.items() if k != "name"}}
            return config_class(str(value.get("kind", "language"))).model_validate(value)
        except ValidationError as error:
            raise nested(error) from None
        except UserError as error:
            message = str(error).removeprefix("model.kind: ")
            raise PydanticCustomError("slot", "{m}", {"m": message}) from None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        assert self.run.dir is not None
        return Path(self.run.dir)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a run's config; plugins are loaded before the rest is judged.

    Raises:
        UserError: for the first mistake, with the file and line or "command line".
    """
    return read_run(path, overrides)[0]


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Source]:
    """`load_run`, and where each key came from."""
    data, source = read_yaml(path)
    apply_overrides(data, overrides, source)
    return parse_run(data, source, Path(path)), source


def parse_run(data: dict[str, Any], source: Source, path: Path) -> RunConfig:
    """Validate plain data that came from `path`; fills in the run's name and folder."""
    load_plugins(data, source, path.parent)
    fill_names(RunConfig, data)
    run = data.get("run")
    if run is None or isinstance(run, dict):
        run = dict(run or {})
        run["name"] = run.get("name") or path.stem
        run["dir"] = run.get("dir") or f"runs/{run['name']}"
        data = {**data, "run": run}
    return parse(RunConfig, data, source)


def write_run(config: RunConfig, folder: Path) -> None:
    """Write the resolved config and copies of its plugin files into the run's folder."""
    plugins = []
    for item in config.plugins:
        if item.endswith(".py"):
            kept = folder / "plugins" / Path(item).name
            if Path(item).resolve() != kept.resolve():
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(item, kept)
            item = f"plugins/{kept.name}"
        plugins.append(item)
    text = yaml.safe_dump({**config.dump(), "plugins": plugins}, sort_keys=False, width=100)
    temporary = folder / "config.yaml.new"
    temporary.write_text(text, encoding="utf8")
    temporary.replace(folder / "config.yaml")
