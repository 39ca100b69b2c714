"""A disk cache of arrays that are expensive to compute, keyed by a hash of their inputs.

The cache is in $BITNET_JAX_CACHE, else $XDG_CACHE_HOME/bitnet_jax or ~/.cache/bitnet_jax; `off` disables it.
Entries are written atomically and read only if their checksum matches; damaged ones are recomputed. The least
recently used entries are removed while the total exceeds MAX_BYTES.

    entry: one line of JSON (name -> dtype and length), the arrays in sequence, BLAKE2b of both (16 bytes)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bitnet_jax.data.errors import one_line

CACHE_VARIABLE = "BITNET_JAX_CACHE"
MAX_BYTES = 1 << 32
DIGEST = 16
SUFFIX = ".arrays"


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


def read_arrays(key: str) -> dict[str, np.ndarray] | None:
    """The arrays [N] cached under a key; None if missing or damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / (key + SUFFIX)
    try:
        if not path.is_file():
            return None
        content = path.read_bytes()
        os.utime(path)  # mark as recently used
    except OSError:
        return None
    body, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.blake2b(body, digest_size=DIGEST).digest() != digest:
        warnings.warn(f"{path} is damaged and is recomputed", stacklevel=2)
        return None
    head, _, _ = body.partition(b"\n")
    arrays, offset = {}, len(head) + 1
    for name, (dtype, length) in json.loads(head).items():
        arrays[name] = np.frombuffer(body, dtype, length, offset)
        offset += arrays[name].nbytes
    return arrays


def write_arrays(key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Cache arrays [N] under a key. If the folder cannot be written, warn instead of raising."""
    folder = cache_folder()
    if folder is None or sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        return
    head = (
        json.dumps({name: (array.dtype.str, len(array)) for name, array in arrays.items()}).encode() + b"\n"
    )
    digest = hashlib.blake2b(head, digest_size=DIGEST)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp", delete=False) as file:
            try:
                file.write(head)
                for array in arrays.values():
                    view = np.ascontiguousarray(array).view(np.uint8).data
                    digest.update(view)
                    file.write(view)
                file.write(digest.digest())
                file.close()
                os.replace(file.name, folder / (key + SUFFIX))
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        evict(folder.glob("*" + SUFFIX), MAX_BYTES)
    except OSError as error:
        warnings.warn(
            f"{folder}: cannot cache tokens ({one_line(error)}); free disk space, or set {CACHE_VARIABLE} to another "
            "folder or to off",
            stacklevel=2,
        )


def evict(files: Iterable[Path], max_bytes: int) -> None:
    """Removes the files that were changed longest ago until the rest takes at most max_bytes. Raises OSError."""
    entries = sorted(((path, path.stat()) for path in files), key=lambda entry: entry[1].st_mtime_ns)
    total = sum(status.st_size for _, status in entries)
    for path, status in entries:
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size
