"""Benchmarks packed products against XLA's float32, bfloat16 and int8 products and against machine limits.

    python -m bitnet_kernels.bench --suite decode --json decode.json

The timed operation is the product of int8 codes with a packed matrix and its rescale to float32 (packed_matmul with
int8 input), inside jit. As in model inference, matrices are cycled from a working set larger than the caches, and
each product of a compiled chain depends on the previous one. All formats, XLA's products, a read-only C++ loop and a
multiply-only C++ loop are timed in interleaved rounds. A row reports the median with the 10th and 90th percentiles,
and ratios of interleaved timings; times of different runs are often not comparable. XLA multiplies one row of x
padded to 8 rows, which is faster.

Rows with another `op` measure single components:

    in_cache       one matrix that stays in the cache, on one thread: unpacking cost without memory traffic
    custom_call    16 x 64 weights: overhead of any call
    fork_join      an empty parallel loop

Values that cannot be measured are null: read ceiling and multiply peak without the C++ library.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.machine import Call, dot_peak, fork_join, provenance, read_all, small_pages
from bitnet_kernels.matmul import choose_implementation, packed_matmul
from bitnet_kernels.packed import FORMATS, PackedArray
from bitnet_kernels.processors import threads
from bitnet_kernels.random_packed import random_packed
from bitnet_kernels.shapes import IN_CACHE, SUITES, TINY, Shape
from bitnet_kernels.timing import Spread, chain, dense, interleaved

XLA = ("float32", "bfloat16", "int8")
XLA_ROWS = 8  # for fewer rows XLA uses a slow loop
# Maximum chain lengths. Long chains amortize program start-up, tenths of a millisecond, and zeroing of result pages;
# compile time limits them.
FEW_ROWS_LINKS, LINKS = 512, 16
READ_PIECE = 256 << 20  # bytes: with smaller pieces helper threads may not have started yet
SPIN_SECONDS = 2e-6  # spin time of each fork_join loop

Row = dict[str, Any]


def copies(nbytes: int, working_set: int) -> int:
    return max(2, math.ceil(working_set / nbytes))


def bench_shape(shape: Shape, ceiling_data: np.ndarray, working_set: int, budget: float) -> list[Row]:
    """One row per format, cycling over working_set bytes of matrices; the ceiling is reading ceiling_data."""
    m, n, k = shape
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(-127, 128, (m, k), np.int8))
    padded = jnp.pad(codes, ((0, max(0, XLA_ROWS - m)), (0, 0)))
    lengths: dict[str, int] = {}
    calls: dict[str, Any] = {}
    for name in XLA:
        first = jnp.asarray(random.integers(-1, 2, (n, k), np.int8)).astype(name)
        several = [first + jnp.zeros_like(first) for _ in range(copies(first.nbytes, working_set))]
        lengths[f"xla {name}"] = min(len(several), LINKS)
        calls[f"xla {name}"] = chain(dense, padded.astype(name), several, lengths[f"xla {name}"])
    matrices: dict[str, PackedArray] = {}
    for name in FORMATS:
        matrices[name] = random_packed(name, (n, k))
        number = copies(matrices[name].codes.nbytes, working_set)
        packed = [matrices[name], *(random_packed(name, (n, k), seed=seed) for seed in range(1, number))]
        lengths[name] = min(number, FEW_ROWS_LINKS if m <= 16 else LINKS)
        calls[name] = chain(packed_matmul, codes, packed, lengths[name])
    limits = _limits(read=read_all(ceiling_data, min(READ_PIECE, ceiling_data.nbytes)), peak=dot_peak())
    took = interleaved(calls | {name: limit.run for name, limit in limits.items()}, 2 * budget, settle=True)
    xla = {name: took[f"xla {name}"] / lengths[f"xla {name}"] for name in XLA}
    rates = {name: limit.amount / took[name].median for name, limit in limits.items()}
    return [
        _row("packed_matmul", m, w, took[name] / lengths[name], rates.get("read"), rates.get("peak"))
        | {"read_ceiling_loop": limits["read"].loop if "read" in limits else None}
        | {
            f"speedup_vs_xla_{other}": t.median / (took[name].median / lengths[name])
            for other, t in xla.items()
        }
        for name, w in matrices.items()
    ]


def bench_overheads(budget: float) -> list[Row]:
    """Overheads other than memory: an in-cache matrix of each format, a tiny product and an empty parallel loop."""
    length, repeats = 4, 16  # a loop over a short chain, to limit compile time

    def repeated(format: str, shape: Shape) -> tuple[PackedArray, Any]:
        w = random_packed(format, (shape.n, shape.k))
        return w, chain(packed_matmul, jnp.ones((shape.m, shape.k), jnp.int8), [w] * length, length, repeats)

    rows = []
    with _one_thread():
        cases = {format: repeated(format, IN_CACHE) for format in FORMATS}
        limits = _limits(peak=dot_peak())
        calls = {name: call for name, (_, call) in cases.items()}
        took = interleaved(calls | {name: limit.run for name, limit in limits.items()}, budget)
        peak = limits["peak"].amount / took["peak"].median if limits else None
        for format, (w, _) in cases.items():
            rows.append(
                _row("in_cache", 1, w, took[format] / (length * repeats), None, peak) | {"threads": 1}
            )
    w, call = repeated("ternary2", TINY)
    limits = _limits(fork_join=fork_join())
    took = interleaved({"call": call} | {name: limit.run for name, limit in limits.items()}, budget)
    rows.append(_row("custom_call", 1, w, took["call"] / (length * repeats), None, None))
    for name, limit in limits.items():
        each = Spread(*(max(0.0, seconds - SPIN_SECONDS) for seconds in took[name] / limit.amount))
        row = dict.fromkeys(rows[-1]) | {"op": name, "threads": threads(), **_microseconds(each)}
        rows.append(row | {"implementation": "cpu"})
    return [row | dict.fromkeys(f"speedup_vs_xla_{other}" for other in XLA) for row in rows]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Runs the C++ kernels, if available, on one thread."""
    if cpu.unavailable():
        yield
        return
    cpu.set_thread_count(1)
    try:
        yield
    finally:
        cpu.set_thread_count(threads())


def _limits(**calls: Call | None) -> dict[str, Call]:
    """The calls that are available here."""
    return {name: call for name, call in calls.items() if call}


def _microseconds(took: Spread) -> Row:
    return {
        "microseconds": took.median * 1e6,
        "microseconds_p10": took.p10 * 1e6,
        "microseconds_p90": took.p90 * 1e6,
    }


def _row(op: str, m: int, w: PackedArray, took: Spread, read: float | None, peak: float | None) -> Row:
    """A row without speedups; read: bytes per second, peak: multiply-accumulates per second."""
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
        **_microseconds(took),
        "weight_bytes": nbytes,
        "gbytes_per_second": nbytes / took.median / 1e9,
        "read_ceiling_gbytes_per_second": read and read / 1e9,
        "read_ceiling_loop": None,
        "ceiling_fraction": read and nbytes / took.median / read,
        "gmacs_per_second": m * n * k / took.median / 1e9,
        "dot_peak_gmacs_per_second": peak and peak / 1e9,
        "peak_fraction": peak and m * n * k / took.median / peak,
    }


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Weights per second of binary relative to ternary2, geometric mean over the shapes of each m."""
    times: dict[int, list[float]] = {}
    for row in rows:
        if row["op"] == "packed_matmul" and row["format"] == "ternary2":
            same = {name: row[name] for name in ("op", "m", "n", "k")} | {"format": "binary"}
            binary = next(other for other in rows if same.items() <= other.items())
            times.setdefault(row["m"], []).append(row["microseconds"] / binary["microseconds"])
    return {f"binary_over_ternary2_m{m}": float(np.exp(np.mean(np.log(t)))) for m, t in times.items()}


COLUMNS = (
    "op            format      m      n      k  runs on             us             [p10, p90]    GB/s  %ceiling"
    "   GMAC/s  %peak       times XLA f32, bf16, int8"
)


def show(row: Mapping[str, Any]) -> str:
    """Formats a row as a line of the table with header COLUMNS."""

    def number(name: str, digits: int = 1, factor: int = 1) -> str:
        return "-" if row[name] is None else f"{factor * row[name]:.{digits}f}"

    names = [str(row[name] or "-") for name in ("op", "format", "m", "n", "k")]
    spread = f"[{number('microseconds_p10', 2)}, {number('microseconds_p90', 2)}]"
    numbers = (
        "{:13} {:9} {:>3} {:>6} {:>6}".format(*names),
        f"{row['isa'] or row['implementation']:10}",
        f"{number('microseconds', 2):>10} {spread:>22}",
        f"{number('gbytes_per_second'):>6} {number('ceiling_fraction', 0, 100):>9}",
        f"{number('gmacs_per_second'):>7} {number('peak_fraction', 0, 100):>6}",
        "     " + " ".join(f"{number(f'speedup_vs_xla_{name}'):>6}" for name in XLA),
    )
    return "  ".join(numbers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: see bench_gpu.py")
    parser.add_argument("--json", type=Path, help="output file for provenance, rows and summary")
    parser.add_argument("--working-set", type=int, default=256, help="MiB of matrices to cycle through")
    parser.add_argument("--seconds", type=float, default=0.5, help="time budget per figure")
    options = parser.parse_args(arguments)

    origin = provenance()
    if options.device == "gpu":
        return _bench_gpu(parser, options, origin)
    print(f"{origin['threads']} threads of {origin['processor']}, commit {origin['commit']}")
    if reason := cpu.unavailable():
        print(f"no ceiling, no peak, and XLA instead of the C++ kernels: {reason}")
    print(COLUMNS)
    working_set = options.working_set << 20
    # Larger than any cache, although a piece is read again in every other round.
    ceiling_data = small_pages(4 * working_set)
    rows: list[Row] = []
    for shape in (None, *SUITES[options.suite]):
        more = (
            bench_overheads(options.seconds)
            if shape is None
            else bench_shape(shape, ceiling_data, working_set, options.seconds)
        )
        for row in more:
            print(show(row), flush=True)
        rows += more
    ratios = summary(rows)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times the weights per second")
    if options.json:
        results = {"provenance": origin, "rows": rows, "summary": ratios}
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _bench_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace, origin: dict[str, Any]) -> None:
    from bitnet_kernels import bench_gpu

    if options.suite not in bench_gpu.GPU_SUITES:
        parser.error(
            f"--suite {options.suite} is for CPUs; expected one of {', '.join(bench_gpu.GPU_SUITES)}"
        )
    if jax.default_backend() != "gpu":
        parser.error(
            f"--device gpu: JAX runs on {jax.default_backend()!r}; install jax[cuda13] on a machine with a GPU"
        )
    results = {"provenance": origin, **bench_gpu.run(options.suite, options.seconds)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
