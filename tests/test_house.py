"""The arrows between the rooms hold, and every package that the code imports is declared."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYDANTIC = {"pydantic-core", "annotated-types"}  # what its own interface is made of
ROOMS: list[str] = PROJECT["tool"]["importlinter"]["root_packages"]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def empty_house(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("")
    return tmp_path


def test_every_package_is_a_room_with_contracts() -> None:
    outside = {"tests", "benchmarks", "configs", "docs", "build"}
    packages = {path.parent.name for path in ROOT.glob("[!.]*/__init__.py")} - outside
    assert packages == set(ROOMS)


def test_an_empty_house_keeps_the_contracts(empty_house: Path) -> None:
    result = lint_imports(empty_house)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("room", "imported"),
    [
        ("core", "model"),
        ("core", "torch"),
        ("model", "data_pipeline"),
        ("data_pipeline", "model"),
        ("model", "parallel"),
        ("parallel", "data_pipeline"),
        ("parallel", "checkpoints"),
        ("checkpoints", "data_pipeline"),
        ("checkpoints", "training"),
        ("training", "evaluation"),
        ("evaluation", "launcher"),
    ],
)
def test_an_upward_import_breaks_them(empty_house: Path, room: str, imported: str) -> None:
    (empty_house / room / "wrong.py").write_text(f"import {imported}\n")
    result = lint_imports(empty_house)
    assert result.returncode == 1, result.stdout
    assert f"{room}.wrong -> {imported}" in result.stdout


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def declared(lists: list[list[str]]) -> set[str]:
    names = (re.split(r"[\[<>=]", item)[0] for group in lists for item in group)
    return {normal(name) for name in names}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_package_is_declared() -> None:
    """Installed today by luck, through another package, is absent tomorrow."""
    extras = PROJECT["project"]["optional-dependencies"]
    known = declared([PROJECT["project"]["dependencies"], *extras.values()])
    distributions = packages_distributions()
    undeclared = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for name in set(imports(ast.parse(path.read_text(encoding="utf8")))):
                if name in sys.stdlib_module_names or name in ROOMS:
                    continue
                homes = {normal(home) for home in distributions.get(name, [name])}
                if not homes & (known | PYDANTIC):
                    undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared


def test_the_pins_fit_the_bounds_and_any_machine() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {normal(line.partition("==")[0]) for line in lines}
    assert not [name for name in pinned if name.startswith("nvidia") or name == "triton"]
    wanted = declared(
        [PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]["dev"]]
    )
    assert wanted <= pinned


def test_the_guide_s_example_works() -> None:
    """The mechanism in CONTRIBUTING.md is one that runs."""
    import torch

    from core.registry import _entries, _lookup, build

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    try:
        exec(compile(code[1], "CONTRIBUTING.md", "exec"), {"__name__": "guide"})
        x_BTD = torch.randn(2, 3, 8)
        scale_BT1 = x_BTD[..., :4].pow(2).mean(-1, keepdim=True).add(1e-3).rsqrt()
        norm = build("norm", {"name": "halfnorm", "eps": 1e-3}, dim=8)
        torch.testing.assert_close(norm(x_BTD), x_BTD * scale_BT1)
    finally:
        _entries["norm"].pop("halfnorm", None)
        _lookup["norm"].pop("halfnorm", None)
