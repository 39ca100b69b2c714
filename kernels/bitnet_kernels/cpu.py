"""The CPU backend: the C++ library, its instruction sets, and its custom calls under jit and vmap."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from bitnet_kernels import reference
from bitnet_kernels.batching import fold_batches
from bitnet_kernels.packed import FORMATS, PackedArray
from bitnet_kernels.processors import affinity, threads

LIBRARY = Path(__file__).parent / "_cpu.so"
ISA_VARIABLE = "BITNET_KERNELS_ISA"

_INTEGER_TARGET = "bitnet_kernels_integer_matmul"
_SCALED_TARGET = "bitnet_kernels_scaled_matmul"
_ATTENTION_TARGET = "bitnet_kernels_attention"
_GRADIENT_TARGET = "bitnet_kernels_attention_gradient"
_EXTEND_TARGET = "bitnet_kernels_extend_attention"
_LOGITS_TARGET = "bitnet_kernels_bfloat16_logits"
_EXACT_TARGET = "bitnet_kernels_exact_top_logits"
_LOOKUP_TARGET = "bitnet_kernels_lookup"
_NORM_TARGET = "bitnet_kernels_rms_norm"
_CODES_TARGET = "bitnet_kernels_code_matmul"
_FLOATS_TARGET = "bitnet_kernels_float_matmul"
_TARGETS = (
    _INTEGER_TARGET,
    _SCALED_TARGET,
    _ATTENTION_TARGET,
    _GRADIENT_TARGET,
    _EXTEND_TARGET,
    _LOGITS_TARGET,
    _EXACT_TARGET,
    _LOOKUP_TARGET,
    _NORM_TARGET,
    _CODES_TARGET,
    _FLOATS_TARGET,
)
_loading = threading.Lock()


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """(library with its custom calls registered, "") or (None, reason why it cannot be used)."""
    if not path.exists():
        return None, f"{path.name} was not built; with a C++17 compiler present, install again to build it"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    try:
        built = library.bitnet_kernels_ffi_api_minor()
        targets = {name: jax.ffi.pycapsule(getattr(library, name)) for name in _TARGETS}
        library.bitnet_kernels_available_isas.restype = ctypes.c_char_p
        library.bitnet_kernels_known_isas.restype = ctypes.c_char_p
        library.bitnet_kernels_read.restype = ctypes.c_uint64
        library.bitnet_kernels_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        library.bitnet_kernels_read_loops.restype = ctypes.c_int64
        library.bitnet_kernels_read_loop_name.restype = ctypes.c_char_p
        library.bitnet_kernels_read_loop_name.argtypes = [ctypes.c_int64]
        library.bitnet_kernels_fork_join.argtypes = [ctypes.c_int64]
        library.bitnet_kernels_dot_peak.restype = ctypes.c_int64
        library.bitnet_kernels_dot_peak.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        library.bitnet_kernels_float_peak.restype = ctypes.c_int64
        library.bitnet_kernels_float_peak.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        library.bitnet_kernels_set_thread_count.argtypes = [ctypes.c_int64]
    except AttributeError as error:
        return None, f"{path.name} is from another version ({error}); install again to build it"
    # Registering a custom call built with newer headers would disable XLA's entire CPU backend.
    header = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    found = re.search(r"#define XLA_FFI_API_MINOR (\d+)", header)
    runtime = int(found.group(1)) if found else -1
    if built > runtime:
        return None, (
            f"{path.name} was built with XLA FFI headers 0.{built}, this jaxlib has 0.{runtime}; build it "
            "with the oldest supported jaxlib (pip does, unless --no-build-isolation is given)"
        )
    for name, target in targets.items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    if threads() < affinity():  # the library knows the affinity only
        library.bitnet_kernels_set_thread_count(threads())
    return library, ""


def load() -> tuple[ctypes.CDLL | None, str]:
    """(library, "") or (None, reason); loads and registers once, thread-safe."""
    with _loading:
        return _load(LIBRARY)


def unavailable() -> str | None:
    """Why the C++ kernels cannot be used, or None if they can."""
    return load()[1] or None


def available_isas() -> tuple[str, ...]:
    """Instruction sets supported by both processor and library, slowest first; () without a library."""
    library, _ = load()
    return tuple(library.bitnet_kernels_available_isas().decode().split(",")) if library else ()


def known_isas() -> tuple[str, ...]:
    """Instruction sets that the library was compiled with, slowest first; () without a library."""
    library, _ = load()
    return tuple(library.bitnet_kernels_known_isas().decode().split(",")) if library else ()


def isa() -> str:
    """The instruction set in use: the one named by BITNET_KERNELS_ISA, or the fastest available.

    Raises:
      RuntimeError: the library is missing.
      ValueError: the name is unknown or not available here.
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


_for_cpu_alone = threading.local()


@contextlib.contextmanager
def for_cpu_alone() -> Iterator[None]:
    """What is traced inside will run on CPU and nowhere else: operations without a named implementation take the C++
    kernels, without XLA's operations beside them for other platforms, whose tracing takes longer."""
    before = is_for_cpu_alone()
    _for_cpu_alone.value = True
    try:
        yield
    finally:
        _for_cpu_alone.value = before


def is_for_cpu_alone() -> bool:
    return getattr(_for_cpu_alone, "value", False)


def resolve(
    operation: str, implementation: str | None, obstacle: str | None
) -> tuple[str | None, str | None]:
    """(implementation, instruction set) of an operation; obstacle: why it cannot use the C++ kernels, or None.

    (None, isa) leaves the choice to the platform compiled for, unless that is known (for_cpu_alone). With an obstacle,
    XLA replaces the kernels, with one warning on CPU, and implementation="cpu" raises NotImplementedError.
    """
    if implementation == "reference":
        return "reference", None
    if not obstacle:
        return implementation or ("cpu" if is_for_cpu_alone() else None), isa()
    if implementation == "cpu":
        raise NotImplementedError(f"implementation='cpu' cannot be used: {obstacle}")
    if jax.default_backend() == "cpu":
        warn_once(operation, obstacle)
    return "reference", None


@functools.cache
def warn_once(operation: str, obstacle: str) -> None:
    message = f"{operation} runs on XLA, much slower than the kernels: {obstacle}"
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def set_thread_count(count: int) -> None:
    """Sets the number of threads of the kernels; the default is `processors.threads()`. Results do not depend on it.

    Raises:
      RuntimeError: the library is missing.
      ValueError: count is less than one.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(f"the C++ kernels are not available: {reason}")
    if count < 1:
        raise ValueError(f"count={count}; expected at least one thread")
    library.bitnet_kernels_set_thread_count(count)


def integer_matmul(x: jax.Array, w: PackedArray, *, isa_name: str | None = None) -> jax.Array:
    """int8 codes [m, k] times a packed matrix -> int32 [G, m, n]; the definition is reference.integer_matmul.

    isa_name: overrides `isa()`. Under vmap a batch axis of x is folded into its rows.
    """
    return _integer_call(w.format, w.groups, w.shape[0], isa_name or isa())(x, w.codes)


def scaled_matmuls(
    x: jax.Array, ws: Sequence[PackedArray], *, activation_bits: int = 8, isa_name: str | None = None
) -> tuple[jax.Array, ...]:
    """x [m, k], int8 codes or float32, times packed matrices and their scales -> float32 [m, n] for each.

    float32 rows are quantized first, to 8 bits, or to 16 (activation_bits), which may also be given as int16 codes.
    activation_bits=1: all codes of x are -1 or 1, and products with binary matrices use popcounts. Bit-identical to
    reference.scaled_matmuls, without its [G, m, n] sums in memory, and to reference.matmuls_of_digits; all matrices
    share one parallel loop.
    """
    if activation_bits == 16 and x.dtype == np.int16:
        return reference.matmuls_of_digits(x, ws, functools.partial(scaled_matmuls, isa_name=isa_name))
    matrices = tuple((w.format, w.shape[0]) for w in ws)
    bits = 8 if activation_bits == 1 and any(w.format != "binary" for w in ws) else activation_bits
    return _scaled_call(matrices, bits, isa_name or isa())(
        x, *(leaf for w in ws for leaf in (w.codes, w.scale, w.minimum) if leaf is not None)
    )


def bfloat16_logits(x: jax.Array, table: jax.Array, *, isa_name: str | None = None) -> jax.Array:
    """float32 [m, k] times the transpose of a bfloat16 table [n, k] -> float32 [m, n]; see head.py."""
    return _logits_call(isa_name or isa())(x, table)


@jax.custom_batching.sequential_vmap
def lookup(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of a bfloat16 table [n, k] at int32 indices [m] -> float32 [m, k]; see lookup.py."""
    rows = jax.ShapeDtypeStruct((indices.shape[0], table.shape[1]), np.float32)
    return jax.ffi.ffi_call(_LOOKUP_TARGET, rows)(table, indices)


def rms_norm(x: jax.Array, gain: jax.Array, *, eps: float) -> jax.Array:
    """float32 [m, k], gain [1, k] or [0, k] (none) -> float32 [m, k]; see norms.py."""
    return _norm_call(eps)(x, gain)


@functools.cache
def _norm_call(eps: float) -> Callable[..., jax.Array]:
    load()

    def call(x: jax.Array, gain: jax.Array) -> jax.Array:
        y = jax.ShapeDtypeStruct(x.shape, np.float32)
        return jax.ffi.ffi_call(_NORM_TARGET, y)(x, gain, eps=np.float32(eps))

    return fold_batches(call, rows_axis=0)


@functools.cache
def _logits_call(isa_name: str) -> Callable[..., jax.Array]:
    load()

    def call(x: jax.Array, table: jax.Array) -> jax.Array:
        y = jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), np.float32)
        return jax.ffi.ffi_call(_LOGITS_TARGET, y)(x, table, isa=isa_name)

    return fold_batches(call, rows_axis=0)


def exact_top_logits(
    x: jax.Array, table: jax.Array, digits: jax.Array, x_scale: jax.Array, sums: jax.Array, w_scale: jax.Array,
    bounds: jax.Array, top: int, isa_name: str,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Logits float32 [m, n] and number of candidates int32 [m]; see head_exact.py.

    digits int8 [2, m, k], x_scale float32 [m], sums int32 [2 m, n] = digits times the codes of the table.
    """
    (m, k), n = x.shape, table.shape[0]
    results = jax.ShapeDtypeStruct((m, n), np.float32), jax.ShapeDtypeStruct((m,), np.int32)
    operands = (x, table, digits.reshape(2 * m, k), x_scale, sums, w_scale.reshape(n), bounds)
    logits, candidates = jax.ffi.ffi_call(_EXACT_TARGET, results)(*operands, top=np.int64(top), isa=isa_name)
    return logits, candidates


@functools.cache
def code_matmul(format: str, groups: int, isa_name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The custom call (x int8 [m, groups * k], w int8 [n, groups * k]) -> float32 [groups, m, n] of products.py."""
    load()
    number = np.int64(list(FORMATS).index(format))

    @jax.custom_batching.sequential_vmap
    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        sums = jax.ShapeDtypeStruct((groups, x.shape[0], w.shape[0]), np.float32)
        return jax.ffi.ffi_call(_CODES_TARGET, sums)(x, w, format=number, isa=isa_name)

    return call


@functools.cache
def float_matmul(
    transposed_a: bool, transposed_b: bool, isa_name: str
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The custom call (a float32, b float32 or int8) -> float32 [m, n] of products.py."""
    load()

    @jax.custom_batching.sequential_vmap
    def call(a: jax.Array, b: jax.Array) -> jax.Array:
        c = jax.ShapeDtypeStruct((a.shape[int(transposed_a)], b.shape[int(transposed_b)]), np.float32)
        layouts = {"transposed_a": transposed_a, "transposed_b": transposed_b}
        return jax.ffi.ffi_call(_FLOATS_TARGET, c)(a, b, **layouts, isa=isa_name)

    return call


@functools.cache
def _integer_call(format: str, groups: int, n: int, isa_name: str) -> Callable[..., jax.Array]:
    load()
    number = np.int64(list(FORMATS).index(format))

    def call(x: jax.Array, codes: jax.Array) -> jax.Array:
        sums = jax.ShapeDtypeStruct((groups, x.shape[0], n), np.int32)
        return jax.ffi.ffi_call(_INTEGER_TARGET, sums)(x, codes, format=number, isa=isa_name)

    return fold_batches(call, rows_axis=1)


@functools.cache
def _scaled_call(
    matrices: tuple[tuple[str, int], ...], activation_bits: int, isa_name: str
) -> Callable[..., tuple[jax.Array, ...]]:
    load()
    numbers = np.array([list(FORMATS).index(format) for format, _ in matrices], np.int64)

    def call(x: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, ...]:
        results = tuple(jax.ShapeDtypeStruct((x.shape[0], n), np.float32) for _, n in matrices)
        call = jax.ffi.ffi_call(_SCALED_TARGET, results)
        bits = np.int64(activation_bits)
        return tuple(call(x, *leaves, formats=numbers, activation_bits=bits, isa=isa_name))

    return fold_batches(call, rows_axis=0)


@functools.cache
def attention(scale: float, isa_name: str) -> Callable[..., jax.Array]:
    """The custom call (q, k, v, k_scale, v_scale, visible, length) of attention.py; sequential under vmap."""
    load()

    @jax.custom_batching.sequential_vmap
    def call(q: jax.Array, *others: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct(q.shape, np.float32)
        return jax.ffi.ffi_call(_ATTENTION_TARGET, out)(q, *others, scale=np.float32(scale), isa=isa_name)

    return call


@functools.cache
def attention_gradient(scale: float, isa_name: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The custom call (q, k, v, visible, dout) -> dq, dk, dv of training_attention.py; sequential under vmap."""
    load()

    @jax.custom_batching.sequential_vmap
    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        results = [jax.ShapeDtypeStruct(x.shape, np.float32) for x in arrays[:3]]
        return tuple(
            jax.ffi.ffi_call(_GRADIENT_TARGET, results)(*arrays, scale=np.float32(scale), isa=isa_name)
        )

    return call


@functools.cache
def extend_attention(scale: float, isa_name: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The custom call (q, new k, new v, k, v, k_scale, v_scale, visible, start, rows, angles) of extend_attention.py,
    which writes k, v and their scales in place; sequential under vmap."""
    load()

    @jax.custom_batching.sequential_vmap
    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        cache = {3 + i: 1 + i for i in range(4)}
        results = [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in (0, *cache)]
        call = jax.ffi.ffi_call(_EXTEND_TARGET, results, input_output_aliases=cache)
        return tuple(call(*arrays, scale=np.float32(scale), isa=isa_name))

    return call
