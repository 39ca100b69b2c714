"""Times packed products against XLA's float32, bfloat16 and int8 products and against what the machine can do.

    python -m bitnet_kernels.bench --suite decode --json decode.json

What is timed: the product of int8 codes with a packed matrix and its rescale to float32 (packed_matmul of
int8 input), inside jit. Matrices are taken in turn from a working set larger than the caches that matter, as
when a model runs, and each product of a compiled chain waits for the one before. All formats, XLA's products, a
C++ loop that only reads and one that only multiplies are timed in turn, round after round: a row tells the median
with its 10th and 90th percentiles, and ratios of things that saw the same machine; times of different runs often
cannot be compared. XLA multiplies one row of x as 8 rows, the faster of its ways.

Rows of another `op` check single things:

    in_cache       one matrix that stays in the cache: what its unpacking costs, without memory
    custom_call    16 x 64 weights: what any call costs

What cannot be measured is null: read ceiling and multiplier peak without the C++ library.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.machine import dot_peak, provenance, read_all
from bitnet_kernels.matmul import choose_implementation, packed_matmul
from bitnet_kernels.packed import FORMATS, PackedArray
from bitnet_kernels.random_packed import random_packed
from bitnet_kernels.shapes import IN_CACHE, SUITES, TINY, Shape
from bitnet_kernels.timing import Spread, chain, interleaved, threads

XLA = ("float32", "bfloat16", "int8")
XLA_ROWS = 8  # XLA multiplies fewer rows by a slow loop
READ, PEAK = "read", "peak"

Row = dict[str, Any]


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's product of float32, bfloat16 (summed in float32) or int8 (summed in int32)."""
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=wide)


def copies(nbytes: int, working_set: int) -> int:
    return max(2, math.ceil(working_set / nbytes))


def bench_shape(shape: Shape, ceiling_data: np.ndarray, budget: float) -> list[Row]:
    """One row per format. The working set of each is as large as `ceiling_data`, whose reading is the ceiling."""
    m, n, k = shape
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(-127, 128, (m, k), np.int8))
    padded = jnp.pad(codes, ((0, max(0, XLA_ROWS - m)), (0, 0)))
    # Long chains hide the 5 to 10 us that a compiled program takes to start; large products need none.
    length = 16 if m <= 16 else 2
    calls: dict[str, Any] = {}
    for name in XLA:
        first = jnp.asarray(random.integers(-1, 2, (n, k), np.int8)).astype(name)
        several = [first + jnp.zeros_like(first) for _ in range(copies(first.nbytes, ceiling_data.nbytes))]
        calls[name] = chain(dense, padded.astype(name), several, 2)
    matrices: dict[str, PackedArray] = {}
    for name in FORMATS:
        matrices[name] = random_packed(name, (n, k))
        number = copies(matrices[name].codes.nbytes, ceiling_data.nbytes)
        packed = [matrices[name], *(random_packed(name, (n, k), seed=seed) for seed in range(1, number))]
        calls[name] = chain(packed_matmul, codes, packed, length)
    limits, macs = _limits(ceiling_data)
    took = interleaved(calls | limits, budget)
    xla = {name: took[name] / 2 for name in XLA}
    read = ceiling_data.nbytes / took[READ].median if READ in took else None
    peak = macs / took[PEAK].median if PEAK in took else None
    return [
        _row("packed_matmul", m, w, took[name] / length, read, peak)
        | {f"speedup_vs_xla_{other}": t.median / (took[name].median / length) for other, t in xla.items()}
        for name, w in matrices.items()
    ]


def bench_in_cache(budget: float) -> list[Row]:
    """One row per format of a matrix that stays in the cache, and one for a call on next to nothing."""
    length = 64
    cases = {("in_cache", name): (IN_CACHE, name) for name in FORMATS}
    cases[("custom_call", "ternary2")] = (TINY, "ternary2")
    matrices = {key: random_packed(name, (shape.n, shape.k)) for key, (shape, name) in cases.items()}
    calls: dict[tuple[str, str], Any] = {
        key: chain(packed_matmul, jnp.ones((1, w.shape[1]), jnp.int8), [w] * length, length)
        for key, w in matrices.items()
    }
    limits, macs = _limits(None)
    took: dict[Any, Spread] = interleaved({**calls, **limits}, budget)
    peak = macs / took[PEAK].median if PEAK in took else None
    return [
        _row(op, 1, w, took[op, name] / length, None, peak)
        | {f"speedup_vs_xla_{other}": None for other in XLA}
        for (op, name), w in matrices.items()
    ]


def _limits(data: np.ndarray | None) -> tuple[dict[str, Any], float]:
    """The calls that only read and only multiply, as far as there are any, and the products of the latter."""
    read, peak = None if data is None else read_all(data), dot_peak()
    calls: dict[str, Any] = {} if read is None else {READ: read}
    if peak is None:
        return calls, 0
    return calls | {PEAK: peak.call}, peak.macs


def _row(op: str, m: int, w: PackedArray, took: Spread, read: float | None, peak: float | None) -> Row:
    """A row but for the speedups; read: bytes a second, peak: products a second."""
    n, k = w.shape
    choice, nbytes = choose_implementation(w), w.codes.nbytes
    return {
        "op": op,
        "format": w.format,
        "m": m,
        "n": n,
        "k": k,
        "threads": threads(),
        "implementation": choice.name,
        "isa": choice.isa,
        "microseconds": took.median * 1e6,
        "microseconds_p10": took.p10 * 1e6,
        "microseconds_p90": took.p90 * 1e6,
        "weight_bytes": nbytes,
        "gbytes_per_second": nbytes / took.median / 1e9,
        "read_ceiling_gbytes_per_second": read and read / 1e9,
        "ceiling_fraction": read and nbytes / took.median / read,
        "gmacs_per_second": m * n * k / took.median / 1e9,
        "dot_peak_gmacs_per_second": peak and peak / 1e9,
        "peak_fraction": peak and m * n * k / took.median / peak,
    }


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Binary against ternary2, weights per second: the geometric mean over the shapes of each m."""
    times: dict[int, list[float]] = {}
    for row in rows:
        if row["op"] == "packed_matmul" and row["format"] == "ternary2":
            same = {name: row[name] for name in ("op", "m", "n", "k")} | {"format": "binary"}
            binary = next(other for other in rows if same.items() <= other.items())
            times.setdefault(row["m"], []).append(row["microseconds"] / binary["microseconds"])
    return {f"binary_over_ternary2_m{m}": float(np.exp(np.mean(np.log(t)))) for m, t in times.items()}


COLUMNS = (
    "op            format      m      n      k  runs on            us   [p10, p90]        GB/s  %ceiling  GMAC/s"
    "  %peak    faster than XLA f32 bf16 int8"
)


def show(row: Mapping[str, Any]) -> str:
    """A row as a line under COLUMNS."""

    def percent(name: str) -> str:
        return "-" if row[name] is None else f"{100 * row[name]:.0f}"

    spread = f"[{row['microseconds_p10']:.1f}, {row['microseconds_p90']:.1f}]"
    faster = [row[f"speedup_vs_xla_{name}"] for name in XLA]
    times = "" if None in faster else "{:14.1f} {:6.1f} {:6.1f}".format(*faster)
    return (
        f"{row['op']:13} {row['format']:9} {row['m']:3} {row['n']:6} {row['k']:6}  "
        f"{row['isa'] or row['implementation']:10} {row['microseconds']:9.1f} {spread:>20} "
        f"{row['gbytes_per_second']:6.1f} {percent('ceiling_fraction'):>9} {row['gmacs_per_second']:7.1f} "
        f"{percent('peak_fraction'):>6} {times}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="all")
    parser.add_argument("--json", type=Path, help="write provenance, rows and summary here")
    parser.add_argument("--working-set", type=int, default=256, help="MiB of matrices taken in turn")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each figure")
    options = parser.parse_args(arguments)

    told = provenance()
    print(f"{told['threads']} threads of {told['processor']}, commit {told['commit']}")
    if reason := cpu.unavailable():
        print(f"no ceiling, no peak, and XLA instead of the C++ kernels: {reason}")
    print(COLUMNS)
    ceiling_data = np.ones(options.working_set << 20, np.uint8)
    rows: list[Row] = []
    for shape in (None, *SUITES[options.suite]):
        more = (
            bench_in_cache(options.seconds)
            if shape is None
            else bench_shape(shape, ceiling_data, options.seconds)
        )
        for row in more:
            print(show(row), flush=True)
        rows += more
    ratios = summary(rows)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times the weights a second")
    if options.json:
        results = {"provenance": told, "rows": rows, "summary": ratios}
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
