import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.log import configure, get_logger


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = get_logger()
    held = (logger.level, logger.propagate, list(logger.handlers))
    yield
    for handler in logger.handlers:
        handler.close()
    logger.level, logger.propagate, logger.handlers = held


@pytest.mark.parametrize(("world", "prefix"), [("1", ""), ("2", "[rank 1] ")])
def test_a_line_goes_to_standard_error_and_to_the_file(
    world: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", world)
    configure(file=tmp_path / "deep" / "log.txt")
    get_logger().info("saved step 5")
    get_logger().debug("not shown")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (tmp_path / "deep" / "log.txt").read_text()
    assert err.split(" ", 1)[1] == f"{prefix}saved step 5\n"


def test_configuring_twice_writes_a_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure(level=logging.WARNING)
    configure(level=logging.WARNING)
    get_logger().info("below the level")
    get_logger().warning("once")
    assert capsys.readouterr().err.count("\n") == 1
