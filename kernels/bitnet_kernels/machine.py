"""What the machine is and what it can do at most: the figures that a benchmark divides by.

read_all      seconds of this are the ceiling of whatever reads weights once
dot_peak      multiply-accumulates a second of int8 dot products on registers, the ceiling of prefill
commit        what was measured
provenance    commit, processor and versions, for the head of a results file
"""

from __future__ import annotations

import contextlib
import datetime
import mmap
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.timing import threads

CODE = ("*.py", "*.cc", "*.h", "*.toml", "Makefile")
STEP = 256  # bytes: bitnet_kernels_read takes multiples of them


class Call(NamedTuple):
    """`run(round)` does `amount` of something: bytes read, loops, products."""

    run: Callable[[int], Any]
    amount: int


def read_all(data: np.ndarray, piece: int | None = None) -> Call | None:
    """A call(round) that reads the bytes of `data` once with all threads; None without the C++ library.

    Args:
      piece: read only so many bytes a call, in turn, so that a call takes as long as what it is compared with: a
        machine that is shared takes whole milliseconds away, which the median of longer calls does not leave out.
    """
    library, _ = cpu.load()
    if library is None:
        return None
    length = (piece or data.nbytes) // STEP * STEP
    pieces = data.nbytes // length

    def read(round: int) -> None:
        library.bitnet_kernels_read(data.ctypes.data + round % pieces * length, length)

    return Call(read, length)


def ordinary_pages(nbytes: int) -> np.ndarray:
    """Memory on pages of the size that weights lie on, be they XLA's arrays or a mapped file. NumPy asks for huge
    pages, from which the same loop reads faster."""
    data = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    data[:] = 1
    return data


def fork_join(loops: int = 1000) -> Call | None:
    """A call(round) that starts and ends `loops` parallel loops, in each of which every thread spins for 2 us."""
    library, _ = cpu.load()
    if library is None:
        return None
    return Call(lambda round: library.bitnet_kernels_fork_join(loops), loops)


def dot_peak(iterations: int = 1 << 20) -> Call | None:
    """A call(round) that multiplies int8 on registers with all threads, by the instructions of the set in use; None
    without the C++ library, or for a set that has no such loop. It takes some milliseconds: in less, a helper may
    not be on its way yet."""
    library, _ = cpu.load()
    if library is None:
        return None
    isa = cpu.isa().encode()
    macs = library.bitnet_kernels_dot_peak(isa, iterations)
    return None if macs == 0 else Call(lambda round: library.bitnet_kernels_dot_peak(isa, iterations), macs)


def processor() -> str:
    """The processor's name where the system tells it (Linux), else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def provenance() -> dict[str, Any]:
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": threads(),
        "isas": list(cpu.available_isas()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def commit() -> str:
    """Of the checkout that this file belongs to, "unknown" of an installed copy; "-dirty" where code differs from it.

    Results, pages and figures do not count: a bench that writes one must not spoil the next.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    git = partial(subprocess.run, cwd=root, capture_output=True, text=True)
    with contextlib.suppress(OSError):
        name = git(["git", "describe", "--always"]).stdout.strip()
        changed = git(["git", "diff", "--quiet", "HEAD", "--", *CODE]).returncode
        return (name or "unknown") + "-dirty" * bool(name and changed)
    return "unknown"
