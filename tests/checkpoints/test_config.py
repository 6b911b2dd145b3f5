"""The `checkpoint:` section as users write it."""

from __future__ import annotations

import pytest

from checkpoints.config import CheckpointConfig
from core.config import parse
from core.errors import UserError


def test_async_is_written_async() -> None:
    config = parse(CheckpointConfig, {"every": 10, "keep": 2, "async": False})
    assert (config.every, config.keep, config.asynchronous) == (10, 2, False)
    assert parse(CheckpointConfig, config.dump()) == config
    assert config.dump()["async"] is False


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"evry": 10}, "evry: unknown key 'evry'; did you mean 'every'?"),
        ({"every": 0}, "every: input should be greater than 0"),
        ({"keep": -1}, "keep: input should be greater than or equal to 0"),
    ],
)
def test_mistakes(data: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(CheckpointConfig, data)
    assert message in str(error.value)
