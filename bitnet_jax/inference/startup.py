"""What makes a command start fast: compiled programs kept from one to the next, and fewer garbage collections.

The second start of a model compiles nothing. JAX keeps programs in a folder, by a hash of the program, its own version
and the compiler's options. Here it is `programs/<jaxlib version>-<hash of the processor>` in the cache folder of
data/cache.py, so that no other processor loads code for instructions that it lacks. `BITNET_JAX_CACHE=off` disables it;
JAX_COMPILATION_CACHE_DIR, JAX's own variable, overrides it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

MAX_BYTES = 1 << 29  # of all programs, at the start of a command; those of a model take about half a megabyte
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}


def collect_less() -> None:
    """Runs Python's garbage collector after more allocations: importing JAX and tracing a model allocate fewer
    objects than this threshold, most of which stay, and looking through them delays the first token."""
    gc.set_threshold(400_000, 20, 100)


def use_compilation_cache() -> None:
    """Sets the environment variables that JAX reads when it is imported; does nothing afterwards."""
    from bitnet_jax.data.cache import cache_folder, evict  # imports numpy, which --help does not need

    folder = cache_folder()
    if folder is None or "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    programs = folder / "programs"
    with contextlib.suppress(OSError):  # JAX warns of a folder that it cannot use
        evict((file for file in programs.rglob("*") if file.is_file()), MAX_BYTES)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs / f"{version('jaxlib')}-{processor()}")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def processor() -> str:
    """A hash of the processor's name and features."""
    described = platform.processor() + platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        described += "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return hashlib.blake2b(described.encode(), digest_size=6).hexdigest()
