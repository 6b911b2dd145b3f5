import os
from pathlib import Path

import pytest

from core.errors import UserError
from core.hashing import file_digest
from data_pipeline.files import decode, digest, expand


def test_globs_are_sorted(documents: Path) -> None:
    found = expand(str(documents / "0*.txt"))
    assert [path.name for path in found] == [f"0{n}.txt" for n in range(10)]


def test_a_missing_file_names_the_nearest(documents: Path) -> None:
    (documents / "moby_dick.txt").write_text("x")
    with pytest.raises(UserError, match=r"moby_dik\.txt: no such file .*'moby_dick\.txt'"):
        expand(str(documents / "moby_dik.txt"))
    with pytest.raises(UserError, match=r"/document: no such .*did you mean 'documents'"):
        expand(str(documents.parent / "document" / "a.txt"))
    with pytest.raises(UserError, match="no file matches this pattern"):
        expand(str(documents / "*.md"))


def test_text_that_is_not_utf8_names_the_byte() -> None:
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text: byte 0xff at offset 12"):
        decode(b"ab\xff", "a.txt", offset=10)


def test_digests_follow_the_content(tmp_path: Path) -> None:
    file, memo = tmp_path / "x", tmp_path / "memo"
    file.write_bytes(b"one")
    os.utime(file, (1000, 1000))
    first = digest(file, memo)
    assert first == file_digest(file) == digest(file, memo)
    # What proves the note is used: the same size and time hide a change of content.
    file.write_bytes(b"two")
    os.utime(file, (1000, 1000))
    assert digest(file, memo) == first
    os.utime(file, (1001, 1001))
    assert digest(file, memo) == file_digest(file) != first


def test_a_file_just_written_is_hashed_again(tmp_path: Path) -> None:
    file, memo = tmp_path / "x", tmp_path / "memo"
    file.write_bytes(b"one")
    first, state = digest(file, memo), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest(file, memo) != first


def test_a_broken_note_is_ignored(tmp_path: Path) -> None:
    file, memo = tmp_path / "x", tmp_path / "memo"
    file.write_bytes(b"one")
    digest(file, memo)
    (note,) = (memo / "digests").iterdir()
    note.write_text("[1")
    assert digest(file, memo) == file_digest(file)
