from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from core import registry
from core.config import Config, load, parse
from core.errors import UserError
from core.registry import Slot, build, entries, get, load_plugin, names, register, resolve


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts from an empty registry and leaves the real one alone."""
    for table in ("_entries", "_lookup", "_loaders"):
        monkeypatch.setattr(registry, table, {})
    yield


@pytest.fixture
def scale() -> type:
    @register("norm", "scale", paper="1607.06450", title="A title", aliases=["times"])
    class Scale:
        """Multiplies.

        Shapes stay as they are.

        Args:
            by: the factor,
                which is positive.
            inner: what is done
                first.

        Raises:
            nothing: ever.
        """

        def __init__(
            self,
            dim: int,
            layer: int = 0,
            *,
            by: Annotated[float, Field(gt=0)] = 2.0,
            inner: Annotated[Any, Slot("norm", optional=True)] = None,
        ):
            self.dim, self.layer, self.by, self.inner = dim, layer, by, inner

    return Scale


class Block(Config):
    norm: Annotated[Any, Slot("norm")] = "scale"


def test_options_are_derived_from_the_signature(scale: type) -> None:
    entry = get("norm", "scale")
    assert entry.structural == ("dim", "layer") and entry.required == ("dim",)
    assert entry.summary == "Multiplies."
    fields = entry.config.model_fields
    assert list(fields) == ["name", "by", "inner"]
    assert fields["by"].default == 2.0
    assert fields["by"].description == "the factor, which is positive."
    assert fields["inner"].description == "what is done first."


def test_build_takes_names_mappings_configs_and_built_parts(scale: type) -> None:
    context = {"dim": 8, "layer": 3, "depth": 12}
    for spec in ("scale", "times", {"name": "times"}, resolve("norm", "scale")):
        part = build("norm", spec, **context)
        assert type(part) is scale and (part.dim, part.layer, part.by) == (8, 3, 2.0)
    assert build("norm", {"name": "scale", "by": 0.5}, **context).by == 0.5
    made = scale(4)
    assert build("norm", made, **context) is made


def test_an_alias_is_written_out_under_the_name(scale: type) -> None:
    assert resolve("norm", "times").dump() == {"name": "scale", "by": 2.0, "inner": None}
    assert names("norm") == ["scale"] and [e.name for e in entries("norm")] == ["scale"]


def test_the_builder_is_told_what_it_did_not_supply(scale: type) -> None:
    with pytest.raises(TypeError, match="norm 'scale' needs dim from whoever builds it"):
        build("norm", "scale", layer=1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scal", "unknown norm 'scal'; did you mean 'scale'?"),
        ({"name": "scale", "bye": 1}, "norm 'scale': bye: unknown key 'bye'; did you mean 'by'?"),
        ({"name": "scale", "by": 0}, "norm 'scale': by: input should be greater than 0 (got 0)"),
        ({"by": 1}, "a norm is a name, or a mapping with 'name' and its options"),
        (
            {"name": "scale", "inner": {"name": "scale", "by": -1}},
            "norm 'scale': inner.by: input should be greater than 0 (got -1)",
        ),
    ],
)
def test_a_mistake_in_a_part_is_one_line(scale: type, spec: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build("norm", spec, dim=8)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norm:\n  name: scale\n  by: 0\n", ":3: norm.by: input should be greater than 0 (got 0)"),
        ("norm: scal\n", ":1: norm: unknown norm 'scal'; did you mean 'scale'?"),
        ("norm: 3\n", ":1: norm: a norm is a name, or a mapping with 'name'"),
        ("norm: null\n", ":1: norm: a norm is a name, or a mapping with 'name'"),
        (
            "norm:\n  name: scale\n  inner:\n    name: scale\n    bye: 1\n",
            ":5: norm.inner.bye: unknown key 'bye'; did you mean 'by'?",
        ),
    ],
)
def test_a_mistake_in_a_file_is_found_through_every_slot(
    scale: type, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(Block, path)
    assert str(caught.value) == f"{path}{message}"


def test_a_slot_resolves_dumps_and_describes_itself(scale: type) -> None:
    block = parse(Block, {"norm": {"name": "times", "by": 3, "inner": "scale"}})
    inner = {"name": "scale", "by": 2.0, "inner": None}
    assert block.dump() == {"norm": {"name": "scale", "by": 3.0, "inner": inner}}
    assert parse(Block, block.dump()) == block
    assert block.norm.build(dim=8).by == 3.0
    schema = Block.model_json_schema()["properties"]["norm"]
    assert schema["anyOf"][0] == {"enum": ["scale"]}


def test_a_part_spells_out_its_parameters() -> None:
    with pytest.raises(TypeError, match="a registered part spells out its parameters"):

        @register("norm", "loose")
        def loose(**anything: Any) -> None: ...


def test_two_parts_cannot_share_a_name(scale: type) -> None:
    with pytest.raises(UserError, match=r"norm 'times' is registered twice: .*Scale.*times"):

        @register("norm", "times")
        def times() -> None: ...

    assert get("norm", "times").target is scale


PLUGIN = """
from core.registry import register

@register("norm", "mine")
class Mine:
    '''My own.'''
    def __init__(self, dim: int, *, power: int = 2):
        self.value = dim**power
"""


def test_a_plugin_file_registers_full_citizens(tmp_path: Path) -> None:
    path = tmp_path / "my_norm.py"
    path.write_text(PLUGIN)
    module = load_plugin(str(path))
    assert parse(Block, {"norm": {"name": "mine", "power": 3}}).norm.build(dim=2).value == 8
    assert load_plugin(str(path)) is module


@pytest.mark.parametrize(
    ("reference", "content", "message"),
    [
        ("gone.py", None, r"plugin .*gone\.py: no such file"),
        ("bad.py", "1/0", r"plugin .*bad\.py: ZeroDivisionError: division by zero"),
        ("syntax.py", "def", r"plugin .*syntax\.py: SyntaxError: "),
        ("no_such_package_at_all", None, "ModuleNotFoundError: No module named 'no_such"),
    ],
)
def test_a_broken_plugin_is_one_line(
    tmp_path: Path, reference: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / reference).write_text(content)
    name = str(tmp_path / reference) if reference.endswith(".py") else reference
    for _ in range(2):  # a failed import leaves nothing behind that would pass the second time
        with pytest.raises(UserError, match=message) as caught:
            load_plugin(name)
        assert "\n" not in str(caught.value)


def test_a_package_is_loaded_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lazy_norms"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from core.registry import export\nexport(__name__, globals())\n"
    )
    (package / "mine.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_from("norm", "lazy_norms")
    assert "norm" not in registry._entries
    assert names("norm") == ["mine"] and registry.slots() == ["norm"]
    from lazy_norms import Mine  # type: ignore[import-not-found]

    assert Mine(3).value == 9
