"""Weights on huge pages: a copy in anonymous memory for which the system is asked for pages of 2 MiB.

A mapped file has pages of 4 KiB, at whose ends the processor's prefetchers stop; a decode step reads every weight, so
larger pages may make it faster. The copy costs the time to read the whole model at loading, and memory that is no
longer shared with other processes nor reclaimable. `bitnet-jax bench --huge-pages` measures what it gains.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PAGE = 2 << 20
ALIGNMENT = 64  # bytes, for jax.device_put to use the memory as it is
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Copied(NamedTuple):
    variables: Any
    memory: np.ndarray  # uint8: all arrays, one after another


def unavailable() -> str | None:
    """Why this system has no huge pages for the asking; None: it has."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system has no madvise(MADV_HUGEPAGE), which is Linux's"
    setting = ""
    with contextlib.suppress(OSError):
        setting = SETTING.read_text()
    return (
        None
        if "[always]" in setting or "[madvise]" in setting
        else f"{SETTING} is {setting.strip() or 'absent'!r}"
    )


def on_huge_pages(variables: Any) -> Copied:
    """The same arrays, copied.

    Raises:
      ValueError: see `unavailable`.
    """
    if reason := unavailable():
        raise ValueError(
            f"got a request for huge pages, expected a system that grants them: {reason}; omit it"
        )
    leaves, structure = jax.tree.flatten(variables)
    sizes = [-(-leaf.nbytes // ALIGNMENT) * ALIGNMENT for leaf in leaves]
    mapped = mmap.mmap(-1, sum(sizes) + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(mapped, np.uint8)
    memory = buffer[-buffer.ctypes.data % PAGE :][: sum(sizes)]
    copies, begin = [], 0
    for leaf, size in zip(leaves, sizes, strict=True):
        copy = memory[begin : begin + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        copy[...] = np.asarray(leaf)
        copies.append(copy)
        begin += size
    return Copied(jax.tree.unflatten(structure, jax.device_put(copies)), memory)
