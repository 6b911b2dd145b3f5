import json
from pathlib import Path

import pytest

from core.errors import UserError
from data_pipeline.sources.base import TextSource
from data_pipeline.sources.jsonl import JsonLines


def texts(source: TextSource) -> list[str]:
    return [document.text for document in source.documents()]


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
