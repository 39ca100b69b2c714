"""Checks and times the packed products of a GPU.

    python -m bitnet_kernels.bench --device gpu --json gpu.json          # --suite decode or prefill for a part

First, on random data, every format and a range of shapes against the reference on the host, bit for bit; the memory of
a result held NaN before. Only then the clock. What is timed are programs of several products, one after the other over
different matrices; the time of a product is the slope between a short and a long program, so that what it costs to
start one cancels. Packed products and XLA's bfloat16 and int8 ones are timed in turn, round after round; so are, before
them, a copy of memory and large dense products, which tell what the device can do.
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
FEWEST, MOST = 8, 48  # products of a long program
PEAK = Shape(8192, 8192, 8192)
COPY_BYTES = 1 << 30

Row = dict[str, Any]
# a short program, a long one, how many products more the long one has
Programs = tuple[Callable[[int], Any], Callable[[int], Any], int]


def check(shapes: Sequence[Shape] = GPU_CHECKED) -> list[Row]:
    """One row for every format and shape; `wrong` counts results that are not bit for bit those of the reference."""
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
            del poison  # its memory is what the product gets
            y = np.asarray(multiply(x, moved))
            row = {"op": "check", "format": format, "m": m, "n": n, "k": k}
            rows.append(row | _ran(moved) | {"wrong": int((y != expected).sum())})
    return rows


def limits(budget: float, peak: Shape = PEAK, copy_bytes: int = COPY_BYTES) -> dict[str, float]:
    """Bytes a second of a copy (read and written ones), products a second of large dense matrices."""
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
    """One row per format; measured: what `limits` gave."""
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
    """Checks, limits and rows of a suite; prints as it goes. Raises RuntimeError where a product is wrong."""
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
    """Equal matrices in memory of their own, more than a cache holds where that takes no more than MOST."""
    return [jax.tree.map(jnp.copy, w) for _ in range(max(FEWEST, min(MOST, -(-cache_bytes // nbytes))))]


def _programs(multiply: Any, x: jax.Array, weights: Sequence[Any], short: int = 2) -> Programs:
    """Programs that multiply x by the first few matrices and by all."""

    @jax.jit
    def products(x: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
        results = []
        for w in weights:
            y = multiply(x, w)
            results.append(y)
            x, _ = jax.lax.optimization_barrier((x, y))  # or XLA would merge products of one x
        return results

    def program(some: Sequence[Any]) -> Callable[[int], Any]:
        return lambda _: jax.block_until_ready(products(x, some))

    return program(weights[:short]), program(weights), len(weights) - short


def _slopes(programs: Mapping[str, Programs], budget: float) -> dict[str, float]:
    """Seconds of one product of each. Raises RuntimeError where noise hides it."""
    calls: dict[tuple[str, str], Callable[[int], Any]] = {}
    for name, (short, long, _) in programs.items():
        calls |= {(name, "short"): short, (name, "long"): long}
    took = interleaved(calls, budget, settle=True)
    slopes = {
        name: (took[name, "long"].median - took[name, "short"].median) / more
        for name, (_, _, more) in programs.items()
    }
    if hidden := [name for name, seconds in slopes.items() if seconds <= 0]:
        raise RuntimeError(
            f"more work took no longer ({', '.join(hidden)}): is something else running? raise --seconds"
        )
    return slopes
