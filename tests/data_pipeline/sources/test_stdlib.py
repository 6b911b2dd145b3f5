import tokenize
from pathlib import Path

import pytest

from core.errors import UserError
from data_pipeline.sources.base import TextSource
from data_pipeline.sources.stdlib import PythonStdlib


def texts(source: TextSource) -> list[str]:
    return [document.text for document in source.documents()]


def test_stdlib_is_the_library_without_its_tests() -> None:
    source = PythonStdlib()
    names = [path.as_posix() for path in source.files]
    assert names == sorted(names) and "tokenize.py" in names and "json/decoder.py" in names
    assert not {"test", "tests", "site-packages"} & {p for path in source.files for p in path.parts}
    (text,) = [d.text for d in source.documents() if d.name == "tokenize.py"]
    assert text == Path(tokenize.__file__).read_bytes().decode()


def test_stdlib_stops_at_the_cap() -> None:
    capped = PythonStdlib(max_megabytes=1)
    assert 500_000 < sum(len(text.encode()) for text in texts(capped)) <= 1_000_000
    assert capped.files == PythonStdlib().files[: len(capped.files)]
    assert capped.fingerprint() != PythonStdlib(max_megabytes=0.1).fingerprint()
    with pytest.raises(UserError, match="max_megabytes; raise it"):
        PythonStdlib(max_megabytes=1e-6).fingerprint()
