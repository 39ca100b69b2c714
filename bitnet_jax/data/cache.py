"""Arrays that took long to make, kept on disk under a key of all they were made from.

They are below $BITNET_JAX_CACHE, else $XDG_CACHE_HOME/bitnet_jax or ~/.cache/bitnet_jax; `off` keeps nothing.
An entry is written whole or not at all, and read only if the checksum at its end is right; a damaged one is made
again. The entries that were not used for longest are removed where all of them exceed MOST_BYTES.

    entry: one line of JSON (name -> dtype and length), the arrays one after another, BLAKE2b of all that (16 bytes)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitnet_jax.data.errors import one_line

CACHE_VARIABLE = "BITNET_JAX_CACHE"
MOST_BYTES = 1 << 32
DIGEST = 16
SUFFIX = ".arrays"


def cache_folder() -> Path | None:
    """Where arrays are kept; None: nowhere."""
    named = os.environ.get(CACHE_VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "bitnet_jax"
    except RuntimeError:  # no home folder
        return None


def read_arrays(key: str) -> dict[str, np.ndarray] | None:
    """The arrays [N] kept under a key; None: there are none, or they are damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / (key + SUFFIX)
    try:
        if not path.is_file():
            return None
        content = path.read_bytes()
        os.utime(path)  # used just now
    except OSError:
        return None
    body, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.blake2b(body, digest_size=DIGEST).digest() != digest:
        warnings.warn(f"{path} is damaged; its content is made again", stacklevel=2)
        return None
    head, _, _ = body.partition(b"\n")
    arrays, place = {}, len(head) + 1
    for name, (dtype, length) in json.loads(head).items():
        arrays[name] = np.frombuffer(body, dtype, length, place)
        place += arrays[name].nbytes
    return arrays


def write_arrays(key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays [N] under a key. A folder that cannot be written to is a UserWarning, no error."""
    folder = cache_folder()
    if folder is None or sum(array.nbytes for array in arrays.values()) > MOST_BYTES:
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
        _shrink(folder)
    except OSError as error:
        warnings.warn(
            f"{folder}: cannot keep tokens for the next start ({one_line(error)}); make room, or set "
            f"{CACHE_VARIABLE} to another folder or to off",
            stacklevel=2,
        )


def _shrink(folder: Path) -> None:
    """Removes the entries that were not used for longest, until the others have MOST_BYTES or less."""
    entries = sorted(
        ((path, path.stat()) for path in folder.glob("*" + SUFFIX)), key=lambda e: e[1].st_mtime_ns
    )
    total = sum(status.st_size for _, status in entries)
    for path, status in entries:
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size
