"""A tiny run."""

import pytest

from tests.launcher.command import write_tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config of a run that takes a second, with its own cache; the config's path."""
    monkeypatch.setenv("MANYFORMS_CACHE", str(tmp_path / "cache"))
    return write_tiny(tmp_path)
