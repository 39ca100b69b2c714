"""Properties and limits of the machine, to relate benchmarks to.

read_all      memory read bandwidth, the limit of any product that reads its weights once
dot_peak      rate of int8 dot products on registers, the limit of prefill
float_peak    rate of float32 products on registers, the limit of training
peak_rss      most memory that this process has had
commit        the measured revision
provenance    commit, processor and versions, for the header of a results file
"""

from __future__ import annotations

import contextlib
import datetime
import mmap
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.processors import threads
from bitnet_kernels.timing import interleaved

CODE = ("*.py", "*.cc", "*.h", "*.toml", "Makefile")
STEP = 512  # bytes; bitnet_kernels_read requires multiples
TRIAL_BYTES, TRIALS = 32 << 20, 5  # read by each loop to find the fastest, and how often


class Call(NamedTuple):
    """`run(round)` performs `amount` units of work: bytes read, loops or multiply-accumulates."""

    run: Callable[[int], Any]
    amount: int
    loop: str | None = None  # which of several, in words


def read_all(data: np.ndarray, piece: int | None = None) -> Call | None:
    """A call that reads the bytes of `data` once with all threads; None without the C++ library.

    Of several loops (csrc/limits.cc) it is the one that is fastest here and now, tried on the first bytes of `data`.

    Args:
      piece: bytes to read per call, cycling through `data`, so that a call takes as long as what it is compared with:
        on a shared machine the median of longer calls includes interruptions of whole milliseconds.
    """
    library, _ = cpu.load()
    if library is None:
        return None
    names = {
        loop: name.decode()
        for loop in range(library.bitnet_kernels_read_loops())
        if (name := library.bitnet_kernels_read_loop_name(loop)) is not None
    }

    def reading(loop: int, piece: int) -> Call:
        length = piece // STEP * STEP
        pieces = data.nbytes // length

        def read(round: int) -> None:
            library.bitnet_kernels_read(data.ctypes.data + round % pieces * length, length, loop)

        return Call(read, length, names[loop])

    piece = piece or data.nbytes
    trials = {loop: reading(loop, min(piece, TRIAL_BYTES)).run for loop in names}
    took = interleaved(trials, rounds=(TRIALS, TRIALS), warmup=1)
    return reading(min(took, key=lambda loop: took[loop].median), piece)


def small_pages(nbytes: int) -> np.ndarray:
    """Memory on ordinary pages, like the weights in XLA arrays or a mapped file. NumPy requests huge pages, from which
    the same loop reads faster."""
    data = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    data[:] = 1
    return data


def fork_join(loops: int = 1000) -> Call | None:
    """A call that runs `loops` parallel loops in which each thread spins for 2 us; None without the C++ library."""
    library, _ = cpu.load()
    if library is None:
        return None
    return Call(lambda round: library.bitnet_kernels_fork_join(loops), loops)


def dot_peak(iterations: int = 1 << 20) -> Call | None:
    """A call that multiplies int8 on registers with all threads, using the current instruction set; None without the
    C++ library or without such a loop for the set. It takes some milliseconds, so that helper threads have started."""
    return _peak("bitnet_kernels_dot_peak", iterations)


def float_peak(iterations: int = 1 << 20) -> Call | None:
    """`dot_peak` for fused multiply-adds of float32."""
    return _peak("bitnet_kernels_float_peak", iterations)


def float_peak_gflops() -> float | None:
    """Billions of float32 operations a second that the threads of the kernels do on registers; None: no such loop."""
    peak = float_peak()
    if peak is None:
        return None
    return 2e-9 * peak.amount / interleaved({"peak": peak.run}, rounds=(5, 5), warmup=1)["peak"].median


def _peak(name: str, iterations: int) -> Call | None:
    library, _ = cpu.load()
    if library is None:
        return None
    isa, run = cpu.isa().encode(), getattr(library, name)
    macs = run(isa, iterations)
    return None if macs == 0 else Call(lambda round: run(isa, iterations), macs)


def peak_rss() -> int:
    """Bytes. On Linux ru_maxrss starts with the memory of the process that started this one; VmHWM does not."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    # In KiB except on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """The processor name if available (Linux), else the architecture."""
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
    """The commit of this checkout, with "-dirty" if code was changed; "unknown" for an installed copy.

    Results, pages and figures are ignored, so that a benchmark that writes them does not affect the next one.
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
