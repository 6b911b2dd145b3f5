from pathlib import Path

import pytest

from core.errors import UserError
from data_pipeline.sources.base import TextSource
from data_pipeline.sources.text import Text


def texts(source: TextSource) -> list[str]:
    return [document.text for document in source.documents()]


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
