"""Contents of files, remembered by size and times."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bitnet_jax.data import DataError, digests
from bitnet_jax.data.digests import contents


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    found, read = [], digests._file_digest

    def noted(path: Path, progress: object) -> str:
        found.append(path.name)
        return read(path, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(digests, "_file_digest", noted)
    return found


def test_only_what_changed_is_read_again(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(name, tmp_path / name) for name in "abc"]
    for name, path in files:
        path.write_text(name)
    kept = tmp_path / "kept" / "contents.json"
    monkeypatch.setattr(digests, "RACY_SECONDS", -1.0)  # as if the files were old
    first = contents(files, kept)
    assert reads == [*"abc"]
    assert contents(files, kept) == first
    assert contents(files, None).digest == first.digest
    assert reads == [*"abcabc"]
    del reads[:]
    files[1][1].write_text("B")
    second = contents(files, kept)
    assert reads == ["b"]
    assert second.digest != first.digest
    with pytest.raises(DataError, match="b: it changed while it was read; start again"):
        first.check_unchanged()
    # The same size and time of modification; the time of the change of the inode tells.
    status = files[2][1].stat()
    files[2][1].write_text("C")
    os.utime(files[2][1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert contents(files, kept).digest != second.digest
    renamed = [("x", path) for _, path in files]
    assert contents(renamed, None).digest != contents(files, None).digest
    for damage in ("", "{", "[1]", '{"a": 1}', '{"a": [1]}'):
        kept.write_text(damage)
        assert contents(files, kept) == contents(files, None)


def test_a_file_that_changed_just_now_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "a").write_text("a")
    kept = tmp_path / "contents.json"
    for _ in range(2):
        contents([("a", tmp_path / "a")], kept)
    assert reads == ["a", "a"]


def test_what_cannot_be_read_has_contents_too(tmp_path: Path) -> None:
    """Whether a bad file is skipped is decided where documents are read."""
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    assert contents([("pipe", tmp_path / "pipe")], None).digest
    assert time.monotonic() - began < 5
