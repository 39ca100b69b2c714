"""The array cache: its location, atomic entries, and its size limit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import cache
from bitnet_jax.data.cache import cache_folder, read_arrays, write_arrays

ARRAYS = {"a": np.arange(5, dtype=np.uint16), "b": np.array([], np.int32), "c": np.arange(3, dtype=np.int32)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def test_the_cache_folder_is_per_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITNET_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bitnet_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "bitnet_jax"
    monkeypatch.setenv("BITNET_JAX_CACHE", "off")
    assert cache_folder() is None
    write_arrays("key", ARRAYS)
    assert read_arrays("key") is None
    assert not list(tmp_path.iterdir())


def test_round_trip(folder: Path) -> None:
    assert read_arrays("key") is None
    write_arrays("key", ARRAYS)
    write_arrays("key", ARRAYS)
    read = read_arrays("key")
    assert read is not None
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert [path.name for path in folder.iterdir()] == ["key.arrays"]


def test_the_least_recently_used_entry_is_evicted_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = {"a": np.zeros(1000, np.uint8)}
    for i in range(3):
        write_arrays(f"key{i}", array)
        os.utime(folder / f"key{i}.arrays", (i, i))
    assert read_arrays("key0") is not None  # used just now
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * (folder / "key0.arrays").stat().st_size)
    write_arrays("key3", array)
    assert sorted(path.name[:4] for path in folder.iterdir()) == ["key0", "key2", "key3"]
    write_arrays("huge", {"a": np.zeros(10_000, np.uint8)})
    assert len(list(folder.iterdir())) == 3


def test_an_unwritable_folder_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot cache tokens"):
        write_arrays("key", ARRAYS)
    assert read_arrays("key") is None


def test_entries_are_written_atomically(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_arrays("key", ARRAYS)
    assert not list(folder.iterdir())
