from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from core.config import Config, apply_overrides, load, read_yaml
from core.errors import UserError


class Optimizer(Config):
    name: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3


class Source(Config):
    path: str
    weight: float = 1.0


class Run(Config):
    steps: int = 10
    is_async: bool = Field(default=True, alias="async")
    optimizer: Optimizer = Optimizer()
    sources: list[Source] = []


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf8")
    return path


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("stepz: 5\n", 1, "stepz: unknown key 'stepz'; did you mean 'steps'?"),
        ("steps: 5\nasinc: true\n", 2, "asinc: unknown key 'asinc'; did you mean 'async'?"),
        (
            "steps: 5\noptimizer:\n  lrr: 1e-3\n",
            3,
            "optimizer.lrr: unknown key 'lrr'; did you mean 'lr'?",
        ),
        ("steps: many\n", 1, "steps: input should be a valid integer, unable to parse string"),
        ("\noptimizer: {lr: 0}\n", 2, "optimizer.lr: input should be greater than 0 (got 0)"),
        ("sources:\n- path: a\n- weight: 2\n", 3, "sources.1.path: this key is required"),
        ("steps: 1\nsteps: 2\n", 2, "'steps' is given twice"),
        ("steps: [1\n", 2, "not valid YAML"),
    ],
)
def test_a_mistake_names_file_line_key_and_remedy(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(Run, path)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(UserError, match=r"rum\.yaml: no such file; did you mean 'run\.yaml'\?"):
        load(Run, tmp_path / "rum.yaml")


@pytest.mark.parametrize("content", [b"- 1\n- 2\n", b"\xff\xfe\x00"])
def test_what_is_not_a_mapping_of_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.yaml: (a config is a mapping|cannot be read)"):
        load(Run, path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(Run, write(tmp_path, "")) == Run()


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "0.0003", "3.0e-4"])
def test_exponents_without_a_point_are_numbers(tmp_path: Path, number: str) -> None:
    path = write(tmp_path, f"optimizer: {{lr: {number}}}\n")
    assert read_yaml(path)[0] == {"optimizer": {"lr": 3e-4}}


def test_overrides_reach_keys_lists_and_part_names(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 5\noptimizer: adamw\nsources: [{path: a}, {path: b}]\n")
    run = load(Run, path, ["steps=7", "optimizer.lr=3e-4", "sources.1.weight=2", "async=false"])
    assert run.steps == 7 and not run.is_async
    assert run.optimizer == Optimizer(name="adamw", lr=3e-4)
    assert [source.weight for source in run.sources] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("steps", "override 'steps': write it as key.sub=value"),
        ("=3", "override '=3': write it as key.sub=value"),
        ("steps.sub=3", "override 'steps.sub=3': there is nothing to set below a plain value"),
        ("sources.4.weight=3", "override 'sources.4.weight=3': '4' is not an index below 1"),
        ("stepz=3", "command line: stepz: unknown key 'stepz'; did you mean 'steps'?"),
        ("optimizer.lr=-1", "command line: optimizer.lr: input should be greater than 0 (got -1)"),
    ],
)
def test_a_mistaken_override_is_named(tmp_path: Path, item: str, message: str) -> None:
    path = write(tmp_path, "steps: 5\nsources: [{path: a}]\n")
    with pytest.raises(UserError) as caught:
        load(Run, path, [item])
    assert str(caught.value) == message


def test_an_override_does_not_take_the_blame_for_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 5\noptimizer: {lr: -1}\n")
    with pytest.raises(UserError, match=r"run\.yaml:2: optimizer\.lr"):
        load(Run, path, ["optimizer.name=muon"])


def test_override_values_are_yaml() -> None:
    data: dict[str, Any] = {}
    apply_overrides(data, ["a=[1, x]", "b.c=null", "d=true", "e=a: {", "f="])
    assert data == {"a": [1, "x"], "b": {"c": None}, "d": True, "e": "a: {", "f": None}


def test_dump_and_replace_round_trip() -> None:
    run = Run.model_validate({"async": False, "sources": [{"path": "a"}]})
    assert run.dump()["async"] is False
    assert Run.model_validate(run.dump()) == run
    assert run.replace(steps=3).steps == 3 and run.steps == 10
