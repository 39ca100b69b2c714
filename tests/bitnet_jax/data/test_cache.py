"""The cache of arrays: its location, checked and atomic entries, and which of them are removed."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.data import DataError, cache
from bitnet_jax.data.cache import Entry, Writer, cache_folder, cached

ARRAYS = {"a": np.arange(5, dtype=np.uint16), "b": np.array([], np.int32), "c": np.arange(3, dtype=np.int32)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    return tmp_path / "deep" / "cache"


class Make:
    """Writes ARRAYS in blocks of two; counts its calls."""

    def __init__(self, arrays: dict[str, np.ndarray] = ARRAYS) -> None:
        self.arrays, self.calls = arrays, 0

    def __call__(self, writer: Writer) -> dict[str, Any]:
        self.calls += 1
        for name, array in self.arrays.items():
            for start in range(0, max(len(array), 1), 2):
                writer.append(name, array[start : start + 2])
        return {"made": self.calls}


def check(entry: Entry) -> None:
    for name, array in ARRAYS.items():
        assert entry.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(entry.arrays[name], array)


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.entry"))


def test_the_cache_folder_is_per_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITNET_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bitnet_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "bitnet_jax"
    monkeypatch.setenv("BITNET_JAX_CACHE", "off")
    assert cache_folder() is None
    make = Make()
    check(cached("key", make))  # its file is gone, its memory is not
    assert cached("key", make).values == {"made": 2}
    assert not list(tmp_path.iterdir())


def test_an_entry_is_made_once_and_mapped(folder: Path) -> None:
    make = Make()
    for _ in range(3):
        entry = cached("key", make)
        check(entry)
        assert entry.values == {"made": 1}
        with pytest.raises(ValueError, match="read-only"):
            entry.arrays["a"][0] = 1
    assert [path.name for path in folder.iterdir() if path.name != "locks"] == ["key.entry"]


@pytest.mark.parametrize("file", ["about.json", "a", "c"])
@pytest.mark.parametrize("damage", ["empty", "shorter", "longer", "changed", "gone"])
def test_a_damaged_entry_is_made_again_with_a_warning(folder: Path, file: str, damage: str) -> None:
    cached("key", Make())
    path = folder / "key.entry" / file
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "shorter": content[:-3],
        "longer": content + b"\0",
        "changed": content[:1] + bytes([content[1] ^ 1]) + content[2:],
    }
    if damage == "gone":
        path.unlink()
    elif (file, damage) == ("about.json", "longer"):
        return  # nothing after its checksum is read
    else:
        path.write_bytes(damaged[damage])
    make = Make()
    with pytest.warns(UserWarning, match="key.entry is damaged and is made again"):
        check(cached("key", make))
    check(cached("key", make))
    assert make.calls == 1
    assert [path.name for path in folder.iterdir() if path.name != "locks"] == ["key.entry"]


@pytest.mark.parametrize("position", range(0, 20, 3))
def test_every_part_has_a_checksum(folder: Path, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    monkeypatch.setattr(cache, "PART", 7)  # bytes: appended arrays and elements span two parts
    make = Make({"a": np.arange(5, dtype=np.int32)})
    for _ in range(2):
        assert cached("key", make).values == {"made": 1}
    content = bytearray((folder / "key.entry" / "a").read_bytes())
    content[position] ^= 1
    (folder / "key.entry" / "a").write_bytes(content)
    with pytest.warns(UserWarning, match="key.entry is damaged and is made again"):
        np.testing.assert_array_equal(cached("key", make).arrays["a"], np.arange(5))


def test_what_was_used_longest_ago_is_removed_unless_it_is_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Make({"a": np.zeros(1000, np.uint8)})
    used = cached("key0", make)
    for i in range(1, 4):
        cached(f"key{i}", make)
    for i in range(4):
        for file in (folder / f"key{i}.entry").iterdir():
            os.utime(file, (i, i))
    cached("key1", make)  # used just now
    monkeypatch.setattr(cache, "MAX_BYTES", 4500)
    cached("key4", make)
    assert names(folder) == ["key0", "key1", "key3", "key4"]  # key0 is oldest, but `used` is mapped
    assert not used.arrays["a"].any()
    del used
    (folder / "key0.entry" / "about.json").touch()
    os.utime(folder / "key0.entry" / "about.json", (0, 0))
    cached("huge", Make({"a": np.zeros(10_000, np.uint8)}))
    assert names(folder) == ["huge"]  # alone beyond the limit, but just made
    # A quarter of a large disk is more.
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1 << 30))
    cached("key5", make)
    assert names(folder) == ["huge", "key5"]


def test_an_unwritable_folder_is_a_warning_and_a_full_disk_an_error(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: Writer) -> dict[str, Any]:
        writer.append("a", ARRAYS["a"])
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot write tokens \(.*No space left.*\); free disk space"):
        cached("key", full)
    assert names(folder) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot cache tokens"):
        check(cached("key", Make()))


def test_an_interrupted_writer_leaves_nothing_and_a_killed_one_is_cleaned_up(folder: Path) -> None:
    def interrupted(writer: Writer) -> dict[str, Any]:
        writer.append("a", ARRAYS["a"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("key", interrupted)
    assert [path.name for path in folder.iterdir()] == ["locks"]
    for name, age in ((".key.left", 0), (".other.running", 0), (".other.left", 2 * cache.ABANDONED_SECONDS)):
        (folder / name).mkdir()
        (folder / name / "a").write_text("half")
        before = os.stat(folder / name).st_mtime - age
        os.utime(folder / name / "a", (before, before))
    check(cached("key", Make()))
    assert sorted(path.name for path in folder.iterdir()) == [".other.running", "key.entry", "locks"]


def test_whoever_needs_an_entry_that_is_being_made_waits_for_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, entered, proceed = Make(), threading.Event(), threading.Event()

    def slow(writer: Writer) -> dict[str, Any]:
        entered.set()
        assert proceed.wait(10)
        return make(writer)

    found: list[Entry] = []
    threads = [threading.Thread(target=lambda: found.append(cached("key", slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    time.sleep(0.2)  # for the others to come to the lock
    assert not found
    proceed.set()
    for thread in threads:
        thread.join()
    for entry in found:
        check(entry)
    assert (len(found), make.calls) == (3, 1)
    assert "waiting for another process" in capsys.readouterr().err
