"""Memory that a training step frees is kept for the next one, where glibc allocates it.

XLA takes the temporary arrays of a step from the C library and gives them back at the end of the step. By default glibc
returns such large pieces to the system, which hands out fresh pages in the next step, each zeroed first. What that
costs is measured in experiments/studies/training_speed.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # mallopt(3)
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps what this process frees, up to 2 GiB at a time; call it before JAX computes anything.

    One heap serves all threads and is neither mapped piece by piece nor trimmed, so the process also keeps the gaps
    between its pieces: it takes more memory.

    Returns:
      False where there is no glibc, and nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST_INT}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
