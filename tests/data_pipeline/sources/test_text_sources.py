import json
import tokenize
from pathlib import Path

import pytest

from core.errors import UserError
from data_pipeline.sources.base import TextSource
from data_pipeline.sources.jsonl import JsonLines
from data_pipeline.sources.stdlib import PythonStdlib
from data_pipeline.sources.text import Text


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


def test_text_reads_files_folders_and_globs(documents: Path) -> None:
    whole = Text(path=str(documents))
    assert len(texts(whole)) == 40
    assert texts(Text(path=str(documents / "*.txt"))) == texts(whole)
    some = Text(path=[str(documents / "07.txt"), str(documents / "03.txt")])
    assert texts(some)[1] == (documents / "03.txt").read_text()


def test_text_is_read_to_the_byte(tmp_path: Path) -> None:
    content = "\ttabs\r\nand  spaces\n\n\u2581é"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert texts(Text(path=str(tmp_path / "a.txt"))) == [content]


def test_a_separator_divides_and_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|>two<|>three")
    source = Text(path=str(tmp_path / "a.txt"), separator="<|>")
    assert texts(source) == ["one", "two", "three"]
    assert source.fingerprint() != Text(path=str(tmp_path / "a.txt")).fingerprint()
    with pytest.raises(UserError, match="separator is empty"):
        Text(path="x", separator="")


def test_fingerprint_follows_the_content(documents: Path, cache: Path) -> None:
    before = Text(cache, path=str(documents)).fingerprint()
    assert Text(cache, path=str(documents)).fingerprint() == before
    (documents / "05.txt").write_text("changed")
    assert Text(cache, path=str(documents)).fingerprint() != before


def test_text_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nthen \xe9t\xe9")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text: byte 0xe9 at offset 10"):
        texts(Text(path=str(tmp_path / "a.txt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no files"):
        texts(Text(path=str(tmp_path / "empty")))


def test_jsonl_reads_a_field(tmp_path: Path) -> None:
    rows = [{"text": "a\nb", "body": "x"}, {"text": "é", "body": "y"}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert texts(JsonLines(path=str(file))) == ["a\nb", "é"]
    assert texts(JsonLines(path=str(file), field="body")) == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl:2: not valid JSON"),
        (b'["text"]', r"a\.jsonl:2: each line is a JSON object"),
        (b'{"txt": "a"}', r"a\.jsonl:2: no field 'text'; did you mean 'txt'"),
        (b'{"text": 3}', r"a\.jsonl:2: field 'text' is not a string"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: .*surrogate pair at character 0"),
        (b'{"text": "\xff"}', r"a\.jsonl: not UTF-8 text: byte 0xff at offset 25"),
    ],
)
def test_jsonl_names_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n' + line)
    with pytest.raises(UserError, match=message):
        texts(JsonLines(path=str(tmp_path / "a.jsonl")))
