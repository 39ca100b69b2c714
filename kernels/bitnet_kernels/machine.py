"""What the machine is and what it can do at most: the figures that a benchmark divides by.

read_all      seconds of this are the ceiling of whatever reads weights once
dot_peak      multiply-accumulates a second of int8 dot products on registers, the ceiling of prefill
provenance    commit, processor and versions, for the head of a results file
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.timing import threads

STEP = 256  # bytes: bitnet_kernels_read takes multiples of them


def read_all(data: np.ndarray) -> Callable[[int], None] | None:
    """A call(round) that reads the bytes of `data` once with all threads; None without the C++ library.

    Each thread reads its own contiguous part; what is left over, less than STEP bytes a thread, is not read.
    """
    library, _ = cpu.load()
    if library is None:
        return None
    part = data.nbytes // threads() // STEP * STEP
    starts = [data.ctypes.data + i * part for i in range(threads())]
    pool = ThreadPoolExecutor(threads())

    def read(round: int) -> None:
        assert data.nbytes  # the closure keeps the memory alive
        list(pool.map(lambda start: library.bitnet_kernels_read(start, part), starts))

    return read


class DotPeak(NamedTuple):
    """`call(round)` makes `macs` int8 multiply-accumulates on registers, with all threads."""

    call: Callable[[int], None]
    macs: float


def dot_peak(iterations: int = 1 << 18) -> DotPeak | None:
    """The peak of the instruction set in use, or None without the C++ library."""
    library, _ = cpu.load()
    if library is None or not hasattr(library, "bitnet_kernels_dot_peak"):
        return None
    isa = cpu.isa().encode()
    pool = ThreadPoolExecutor(threads())

    def call(round: int) -> None:
        list(pool.map(lambda _: library.bitnet_kernels_dot_peak(isa, iterations), range(threads())))

    return DotPeak(call, threads() * library.bitnet_kernels_dot_peak(isa, iterations))


def processor() -> str:
    """The processor's name where the system tells it (Linux), else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def provenance() -> dict[str, Any]:
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": threads(),
        "isas": list(cpu.available_isas()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def _commit() -> str:
    """Of the checkout that this file belongs to; an installed copy has none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"
