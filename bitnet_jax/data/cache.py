"""A disk cache of arrays that are expensive to compute, keyed by a hash of their inputs, and mapped into memory.

The cache is in $BITNET_JAX_CACHE, else $XDG_CACHE_HOME/bitnet_jax or ~/.cache/bitnet_jax; `off` disables it.

    KEY.entry/about.json     values, and of each array dtype, length and the CRC-32 of every PART bytes; after them the
                             CRC-32 of all that
    KEY.entry/NAME           an array
    locks/KEY                held while the entry is made: other processes that need it wait

An entry is written under another name and renamed, and read only if its checksums match; a damaged one is made again.
A process that uses an entry holds a lock on its about.json, and such an entry is not removed. Of the others, those
that were used longest ago are, while all take more than MAX_BYTES or a quarter of what the disk could give them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.progress import progress_bar

CACHE_VARIABLE = "BITNET_JAX_CACHE"
MAX_BYTES = 1 << 32
SUFFIX, ABOUT = ".entry", "about.json"
BLOCK = 1 << 22  # bytes read at a time
PART = 1 << 26  # bytes per checksum, so that several threads can check an array
ABANDONED_SECONDS = 86_400.0  # since the last change of an entry that nobody completed


class Entry(NamedTuple):
    values: dict[str, Any]  # JSON
    arrays: dict[str, np.ndarray]  # [N], read-only


class Writer:
    """Writes the arrays of an entry, block by block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._arrays: dict[str, dict[str, Any]] = {}

    def append(self, name: str, array: np.ndarray) -> None:
        """Appends an array [n], of the same dtype for each name."""
        if name not in self._files:
            self._files[name] = (self._folder / name).open("xb")
            self._arrays[name] = {"dtype": array.dtype.str, "length": 0, "crc32": []}
        about, content = self._arrays[name], np.ascontiguousarray(array).view(np.uint8).data
        position, written = about["length"] * array.itemsize, 0
        while written < len(content):
            start = (position + written) % PART
            piece = content[written : written + PART - start]
            if not start:
                about["crc32"].append(0)
            about["crc32"][-1] = zlib.crc32(piece, about["crc32"][-1])
            written += len(piece)
        about["length"] += len(array)
        self._files[name].write(content)

    def close(self, values: dict[str, Any] | None = None) -> None:
        """With values, the entry is complete."""
        for file in self._files.values():
            file.close()
        if values is not None:
            text = json.dumps({"values": values, "arrays": self._arrays})
            (self._folder / ABOUT).write_text(f"{text}\n{zlib.crc32(text.encode())}\n", encoding="utf-8")


def cache_folder() -> Path | None:
    """The cache folder, or None if the cache is off."""
    named = os.environ.get(CACHE_VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "bitnet_jax"
    except RuntimeError:  # no home directory
        return None


def cached(key: str | None, make: Callable[[Writer], dict[str, Any]]) -> Entry:
    """The entry of a key, made if there is none.

    Without a key or a cache, or if its folder cannot be written (a UserWarning), the arrays are in a temporary file.

    Args:
      make: writes the arrays and returns the values.
    Raises:
      DataError: the disk is full.
    """
    folder = cache_folder()
    if key is not None and folder is not None:
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            lock = (folder / "locks" / key).open("w")
        except OSError as error:
            warnings.warn(
                f"{folder}: cannot cache tokens ({one_line(error)}); set {CACHE_VARIABLE} to another folder, or to off",
                stacklevel=2,
            )
            folder = None
    if key is None or folder is None:
        with tempfile.TemporaryDirectory(prefix="bitnet_jax-", ignore_cleanup_errors=True) as temporary:
            _write(Path(temporary), make)
            return _mapped(Path(temporary))  # stays mapped when the name is gone
    with lock:
        if not _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            print(f"waiting for another process that writes the same tokens to {folder}", file=sys.stderr)
            _lock(lock, fcntl.LOCK_EX)
        path = folder / (key + SUFFIX)
        if (entry := _read(path)) is None:
            for abandoned in folder.glob(
                f".{key}.*"
            ):  # by a process that was killed: nobody else holds the lock
                shutil.rmtree(abandoned, ignore_errors=True)
            place = Path(tempfile.mkdtemp(dir=folder, prefix=f".{key}."))
            try:
                _write(place, make)
                os.rename(place, path)
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
            entry = _mapped(path)
            _evict_entries(folder)
    return entry


def _write(place: Path, make: Callable[[Writer], dict[str, Any]]) -> None:
    writer = Writer(place)
    try:
        writer.close(make(writer))
    except OSError as error:
        raise DataError(
            f"{place.parent}: cannot write tokens ({one_line(error)}); free disk space, or set {CACHE_VARIABLE} to a "
            "folder with more"
        ) from error
    finally:
        writer.close()


def _read(path: Path) -> Entry | None:
    """The entry in a folder, None if there is none; a damaged one is removed with a UserWarning."""
    if not path.exists():
        return None
    try:
        entry = _mapped(path, check=True)
        os.utime(path / ABOUT)  # used just now
        return entry
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        warnings.warn(f"{path} is damaged and is made again", stacklevel=4)
        _move_away(path)
        return None


class _Guard:
    """A shared lock on an entry in use."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _lock(descriptor, fcntl.LOCK_SH)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._descriptor)


class _Mapping(mmap.mmap):
    """The memory of a mapped file; its entry is in use for as long as an array refers to it."""

    guard: _Guard


def _mapped(path: Path, check: bool = False) -> Entry:
    """The arrays of a complete entry, mapped into memory. Raises ValueError (among others): it is damaged."""
    guard = _Guard(os.open(path / ABOUT, os.O_RDONLY))
    text, crc32, *_ = (path / ABOUT).read_text(encoding="utf-8").splitlines()
    if int(crc32) != zlib.crc32(text.encode()):
        raise ValueError("wrong checksum")
    about = json.loads(text)
    if check:
        _check(path, about["arrays"])
    arrays = {}
    for name, array in about["arrays"].items():
        if not array["length"]:
            arrays[name] = np.zeros(0, array["dtype"])
            continue
        with (path / name).open("rb") as file:
            mapping = _Mapping(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapping.guard = guard
        if hasattr(mmap, "MADV_RANDOM"):  # windows are read in random order: do not read ahead
            mapping.madvise(mmap.MADV_RANDOM)
        arrays[name] = np.frombuffer(mapping, array["dtype"], array["length"])
    return Entry(about["values"], arrays)


def _check(path: Path, arrays: dict[str, Any]) -> None:
    """Raises ValueError or OSError unless the files hold what was written."""
    parts = [(name, number) for name, array in arrays.items() for number in range(len(array["crc32"]))]
    for name, array in arrays.items():
        if (path / name).stat().st_size != array["length"] * np.dtype(array["dtype"]).itemsize:
            raise ValueError(f"{name}: wrong size")

    def crc32_of(part: tuple[str, int]) -> int:
        name, number = part
        crc32, left, buffer = 0, PART, bytearray(BLOCK)
        with (path / name).open("rb") as file:
            file.seek(number * PART)
            while left and (count := file.readinto(memoryview(buffer)[:left])):
                crc32 = zlib.crc32(memoryview(buffer)[:count], crc32)
                left -= count
        return crc32

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress_bar(
            len(parts) * PART, unit="B", description="checking cached tokens", delay=1.0
        ) as progress,
    ):
        for (name, number), crc32 in zip(parts, pool.map(crc32_of, parts), strict=True):
            if crc32 != arrays[name]["crc32"][number]:
                raise ValueError(f"{name}: wrong checksum")
            progress.update(PART)


def _lock(file: Any, kind: int) -> bool:
    """False if another process holds it, for kinds with LOCK_NB. Where files cannot be locked, all are free."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _evict_entries(folder: Path) -> None:
    """Removes what nobody uses, see the module docstring."""
    entries = []
    for path in (*folder.glob("*" + SUFFIX), *folder.glob(".*.*")):
        with contextlib.suppress(OSError):
            files = [file.stat() for file in path.iterdir()]
            last = max((status.st_mtime for status in files), default=path.stat().st_mtime)
            if path.suffix == SUFFIX:
                entries.append((last, sum(status.st_size for status in files), path))
            elif time.time() - last > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    total = sum(size for _, size, _ in entries)
    allowed = max(MAX_BYTES, (shutil.disk_usage(folder).free + total) // 4)
    for _, size, path in sorted(entries):
        if total > allowed and not _used(path):
            _move_away(path)
            total -= size


def _used(path: Path) -> bool:
    """Whether a process has the entry mapped."""
    with contextlib.suppress(OSError), (path / ABOUT).open() as about:
        return not _lock(about, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return False


def _move_away(path: Path) -> None:
    """Removes an entry at once, so that no other process finds half of it."""
    gone = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def evict(files: Iterable[Path], max_bytes: int) -> None:
    """Removes the files that were changed longest ago until the rest takes at most max_bytes. Raises OSError."""
    entries = sorted(((path, path.stat()) for path in files), key=lambda entry: entry[1].st_mtime_ns)
    total = sum(status.st_size for _, status in entries)
    for path, status in entries:
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size
