"""The CPU backend: the C++ library, its instruction sets, and the custom call under jit and vmap."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from bitnet_kernels.packed import FORMATS, PackedArray

LIBRARY = Path(__file__).parent / "_cpu.so"
ISA_VARIABLE = "BITNET_KERNELS_ISA"
MAX_GROUP_INPUTS = 2**18  # int32 accumulators of the C++ side; kMaxGroupInputs there

_TARGET = "bitnet_kernels_integer_matmul"
_loading = threading.Lock()


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """(the library with its custom call registered, "") or (None, why it cannot be used)."""
    if not path.exists():
        return None, f"{path.name} was not built; with a C++17 compiler present, install again to build it"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    # Registering a custom call that was built with newer headers would disable XLA's whole CPU backend.
    header = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    found = re.search(r"#define XLA_FFI_API_MINOR (\d+)", header)
    built, runtime = library.bitnet_kernels_ffi_api_minor(), int(found.group(1)) if found else -1
    if built > runtime:
        return None, (
            f"{path.name} was built with XLA FFI headers 0.{built}, this jaxlib has 0.{runtime}; build it "
            "with the oldest supported jaxlib (pip does, unless --no-build-isolation is given)"
        )
    library.bitnet_kernels_available_isas.restype = ctypes.c_char_p
    library.bitnet_kernels_read.restype = ctypes.c_uint64
    library.bitnet_kernels_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(getattr(library, _TARGET)), platform="cpu")
    return library, ""


def load() -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, reason); loads and registers once, whatever the number of threads."""
    with _loading:
        return _load(LIBRARY)


def unavailable() -> str | None:
    """Why the C++ kernels cannot be used, or None where they can."""
    return load()[1] or None


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this processor and the library have, slowest first; () without a library."""
    library, _ = load()
    return tuple(library.bitnet_kernels_available_isas().decode().split(",")) if library else ()


def isa() -> str:
    """The instruction set in use: the one named by BITNET_KERNELS_ISA, or the fastest available.

    Raises RuntimeError without a library and ValueError for a name that is unknown or not available here.
    """
    available = available_isas()
    if not available:
        raise RuntimeError(f"the C++ kernels are not available: {unavailable()}")
    forced = os.environ.get(ISA_VARIABLE)
    if not forced:
        return available[-1]
    if forced not in available:
        raise ValueError(
            f"{ISA_VARIABLE}={forced!r} is not available on this machine; "
            f"expected one of {', '.join(available)}"
        )
    return forced


def integer_matmul(x: jax.Array, w: PackedArray, *, isa_name: str | None = None) -> jax.Array:
    """int8 codes [m, k] times a packed matrix -> int32 [G, m, n]; the definition is reference.integer_matmul.

    isa_name: an instruction set other than `isa()`. Under vmap a batch axis of x is folded into its rows.
    """
    call = _custom_call(FORMATS[w.format].bits, w.shape[0], w.groups, isa_name or isa())
    return call(x, w.codes)


@functools.cache
def _custom_call(
    bits: int, n: int, groups: int, isa_name: str
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    load()

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, codes: jax.Array) -> jax.Array:
        sums = jax.ShapeDtypeStruct((groups, x.shape[0], n), np.int32)
        return jax.ffi.ffi_call(_TARGET, sums)(x, codes, bits=np.int64(bits), isa=isa_name)

    @call.def_vmap
    def call_batched(
        axis_size: int, batched: list[bool], x: jax.Array, codes: jax.Array
    ) -> tuple[jax.Array, bool]:
        x_batched, codes_batched = batched
        if codes_batched:  # matrices of their own: one after the other
            rows = (x, codes) if x_batched else codes
            return jax.lax.map(lambda one: call(*one) if x_batched else call(x, one), rows), True
        sums = call(x.reshape(axis_size * x.shape[1], x.shape[2]), codes)
        return sums.reshape(groups, axis_size, x.shape[1], n).transpose(1, 0, 2, 3), True

    return call
