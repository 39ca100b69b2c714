"""Checks and benchmarks packed products on a GPU.

    python -m bitnet_kernels.bench --device gpu --json gpu.json          # --suite decode or prefill for a subset

First, every format and a range of shapes are compared bit for bit with the reference on the host, on random data and
with result memory that held NaN before. Timing follows only if all agree. The time of a product is the slope between
a short and a long program of consecutive products of different matrices, so the launch overhead cancels. Packed
products and XLA's bfloat16 and int8 products are timed in interleaved rounds; before them, so are a memory copy and
large dense products, which measure the limits of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import reference
from bitnet_kernels.matmul import choose_implementation, for_platform, packed_matmul
from bitnet_kernels.packed import PackedArray
from bitnet_kernels.random_packed import random_packed
from bitnet_kernels.shapes import GPU_CHECKED, GPU_SUITES, Shape
from bitnet_kernels.timing import dense, interleaved

FORMATS = ("binary", "ternary2")
XLA = ("bfloat16", "int8")
CACHE_BYTES = 128 << 20  # more than the second-level cache of any GPU
FEWEST, MOST = 8, 48  # products in a long program
PEAK = Shape(8192, 8192, 8192)
COPY_BYTES = 1 << 30

Row = dict[str, Any]
# (short program, long program, number of additional products in the long one)
Programs = tuple[Callable[[int], Any], Callable[[int], Any], int]


def check(shapes: Sequence[Shape] = GPU_CHECKED) -> list[Row]:
    """One row per format and shape; `wrong` counts results that differ from the reference in any bit."""
    rows = []
    for format in FORMATS:
        for m, n, k in shapes:
            x = np.random.default_rng(m + n + k).integers(-128, 128, (m, k), np.int8)
            with jax.default_device(jax.devices("cpu")[0]):
                w = random_packed(format, (n, k), seed=n)
                expected = np.asarray(jax.jit(reference.scaled_matmul)(jnp.asarray(x), w))
            moved = for_platform(jax.device_put(w, jax.devices()[0]))
            multiply = jax.jit(packed_matmul).lower(x, moved).compile()
            poison = jnp.full((16, m, n), jnp.nan).block_until_ready()
            del poison  # the product reuses its memory
            y = np.asarray(multiply(x, moved))
            row = {"op": "check", "format": format, "m": m, "n": n, "k": k}
            rows.append(row | _ran(moved) | {"wrong": int((y != expected).sum())})
    return rows


def limits(budget: float, peak: Shape = PEAK, copy_bytes: int = COPY_BYTES) -> dict[str, float]:
    """Bytes per second of a copy (read plus written), multiply-accumulates per second of large dense products."""
    data = jnp.zeros(copy_bytes // 4, jnp.int32)
    copies = jax.jit(lambda a, times: jax.lax.fori_loop(0, times, lambda _, a: a ^ 1, a))
    programs: dict[str, Programs] = {
        "copy": (
            lambda _: copies(data, 2).block_until_ready(),
            lambda _: copies(data, 10).block_until_ready(),
            8,
        )
    }
    for name in XLA:
        a, b = jnp.ones((peak.m, peak.k), name), jnp.ones((peak.n, peak.k), name)
        programs[name] = _programs(dense, a, [b] * 6, short=2)
    took = _slopes(programs, budget)
    rates = {name: peak.m * peak.n * peak.k / took[name] for name in XLA}
    return {"copy": 2 * data.nbytes / took["copy"]} | rates


def bench_shape(
    shape: Shape, measured: Mapping[str, float], budget: float, cache_bytes: int = CACHE_BYTES
) -> list[Row]:
    """One row per format; measured: the result of `limits`."""
    m, n, k = shape
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(-127, 128, (m, k), np.int8))
    programs = {}
    for name in XLA:
        matrix = jnp.asarray(random.integers(-1, 2, (n, k), np.int8)).astype(name)
        programs[f"xla {name}"] = _programs(
            dense, codes.astype(name), _copies(matrix, matrix.nbytes, cache_bytes)
        )
    packed = {format: for_platform(random_packed(format, (n, k))) for format in FORMATS}
    for format, w in packed.items():
        programs[format] = _programs(packed_matmul, codes, _copies(w, w.codes.nbytes, cache_bytes))
    took = _slopes(programs, budget)
    rows = []
    for format, w in packed.items():
        seconds, nbytes = took[format], w.codes.nbytes
        row: Row = {"op": "packed_matmul", "format": format, "m": m, "n": n, "k": k} | _ran(w)
        row |= {
            "microseconds": seconds * 1e6,
            "weight_bytes": nbytes,
            "gbytes_per_second": nbytes / seconds / 1e9,
        }
        row["copy_fraction"] = nbytes / seconds / measured["copy"]
        row |= {f"{name}_peak_fraction": m * n * k / seconds / measured[name] for name in XLA}
        row |= {f"speedup_vs_xla_{name}": took[f"xla {name}"] / seconds for name in XLA}
        rows.append(row)
    return rows


def run(suite: str, budget: float) -> dict[str, Any]:
    """Checks, limits and rows of a suite, printed as they come. Raises RuntimeError if a product is wrong."""
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    checks = check()
    for row in checks:
        print(
            "{op} {format:9} m={m:<4} n={n:<6} k={k:<6} {implementation:9} {wrong} wrong".format(**row),
            flush=True,
        )
    if any(row["wrong"] for row in checks):
        raise RuntimeError("products differ from the reference (see above); nothing was timed")
    measured = limits(budget)
    print(", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in measured.items()), flush=True)
    rows = []
    for shape in GPU_SUITES[suite]:
        for row in bench_shape(shape, measured, budget):
            print(
                "{format:9} m={m:<5} n={n:<6} k={k:<6} {implementation:9} {microseconds:9.2f} us"
                "  {copy_fraction:5.2f} of copy  {int8_peak_fraction:5.2f} of int8 peak"
                "  {speedup_vs_xla_bfloat16:6.2f} x bfloat16  {speedup_vs_xla_int8:6.2f} x int8".format(
                    **row
                ),
                flush=True,
            )
            rows.append(row)
    return {"device": device.device_kind, "checks": checks, "limits": measured, "rows": rows}


def _ran(w: PackedArray) -> Row:
    choice = choose_implementation(w)
    return {"implementation": choice.name, "reason": choice.reason}


def _copies(w: Any, nbytes: int, cache_bytes: int) -> list[Any]:
    """Separate copies of a matrix, in all larger than the cache but at most MOST."""
    return [jax.tree.map(jnp.copy, w) for _ in range(max(FEWEST, min(MOST, -(-cache_bytes // nbytes))))]


def _programs(multiply: Any, x: jax.Array, weights: Sequence[Any], short: int = 2) -> Programs:
    """Programs that multiply x by the first `short` matrices and by all."""

    @jax.jit
    def products(x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
        results = []
        for w in weights:
            y = multiply(x, w)
            results.append(y)
            x, _ = jax.lax.optimization_barrier((x, y))  # keeps XLA from merging products of the same x
        return results

    def program(some: Sequence[Any]) -> Callable[[int], Any]:
        return lambda _: jax.block_until_ready(products(x, some))

    return program(weights[:short]), program(weights), len(weights) - short


def _slopes(programs: Mapping[str, Programs], budget: float) -> dict[str, float]:
    """Seconds per product of each program. Raises RuntimeError if noise exceeds it."""
    calls: dict[tuple[str, str], Callable[[int], Any]] = {}
    for name, (short, long, _) in programs.items():
        calls |= {(name, "short"): short, (name, "long"): long}
    took = interleaved(calls, budget, settle=True)
    slopes = {
        name: (took[name, "long"].median - took[name, "short"].median) / more
        for name, (_, _, more) in programs.items()
    }
    if noisy := [name for name, seconds in slopes.items() if seconds <= 0]:
        raise RuntimeError(
            f"timing noise exceeds the signal ({', '.join(noisy)}); stop other programs or raise --seconds"
        )
    return slopes
