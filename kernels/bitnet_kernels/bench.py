"""Times packed products against XLA's float32, bfloat16 and int8 products and against the speed of memory.

    python -m bitnet_kernels.bench --suite decode --json decode.json

What is timed: the product of int8 codes with a packed matrix and its rescale to float32 (packed_matmul of
int8 input), inside jit. Matrices are taken in turn from a working set larger than the caches that matter, as
when a model runs, and each product of a compiled chain waits for the one before. A row tells the median over
chains, divided by the length of the chain; the first calls are not counted. The read ceiling is a C++ loop
that only reads, over as many bytes with as many threads, measured in the same run: compare ratios to it, for
times of different runs often cannot be compared. What is not measured is null: the peak of the multipliers
(peak_fraction), and the ceiling where the C++ library is absent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.matmul import choose_implementation, packed_matmul
from bitnet_kernels.packed import FORMATS, PackedArray, codes_shape
from bitnet_kernels.shapes import SUITES, Shape

Product = Callable[[jax.Array, Any], jax.Array]


def threads() -> int:
    """Processors that this process may use: the size of XLA's pool."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(call: Callable[[int], Any], budget: float) -> float:
    """The median time of call(0), call(1), ..., within a budget of seconds but at least three calls."""
    call(0), call(1)  # compilation, first touch of memory
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 1000):
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def read_ceiling(working_set: int, budget: float) -> float | None:
    """Bytes per second of reading memory with all threads, or None without the C++ library."""
    library, _ = cpu.load()
    if library is None:
        return None
    part = working_set // threads() // 256 * 256
    data = np.ones(part * threads(), np.uint8)
    starts = [data.ctypes.data + i * part for i in range(threads())]
    with ThreadPoolExecutor(threads()) as pool:
        read = lambda _: list(pool.map(lambda start: library.bitnet_kernels_read(start, part), starts))  # noqa: E731
        return data.nbytes / seconds(read, budget)


def chained(product: Product, x: jax.Array, weights: Sequence[Any], length: int, budget: float) -> float:
    """Seconds of one product, taking the weights in turn in compiled chains."""

    @jax.jit
    def chain(x: jax.Array, weights: Sequence[Any]) -> jax.Array:
        for w in weights:
            y = product(x, w)
            never = y[0, 0].astype(jnp.float32) == math.pi  # but the next product has to wait for y
            x = jnp.where(never, jnp.zeros_like(x), x)
        return y

    links = [
        tuple(weights[(i + j) % len(weights)] for j in range(length)) for i in range(0, len(weights), length)
    ]
    return seconds(lambda i: chain(x, links[i % len(links)]).block_until_ready(), budget) / length


def random_packed(format: str, shape: Shape, seed: int) -> PackedArray:
    """Random codes, packed already (their padding is not zero, which costs and saves no time)."""
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, codes_shape(format, (shape.n, shape.k)), np.uint8)
    if format == "ternary2":
        packed &= ~((packed & (packed >> 1) & 0x55) * np.uint8(2))  # no field 3
    if format == "ternary5":
        packed %= np.uint8(243)
    scale = jnp.ones((1, 1), jnp.float32)
    return PackedArray(jnp.asarray(packed), scale, format, "panel16", (shape.n, shape.k))


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's product of float32, bfloat16 (summed in float32) or int8 (summed in int32)."""
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=wide)


def copies(nbytes: int, working_set: int) -> int:
    return max(2, math.ceil(working_set / nbytes))


def bench_shape(shape: Shape, ceiling: float | None, working_set: int, budget: float) -> list[dict[str, Any]]:
    """One row per format."""
    random = np.random.default_rng(0)
    codes = jnp.asarray(random.integers(-127, 128, (shape.m, shape.k), np.int8))
    products = shape.m * shape.n * shape.k
    # Long chains hide the 5 to 10 us that a compiled program takes to start; XLA's large products need none.
    length = 16 if shape.m <= 16 else 2
    xla_length = length if shape.n * shape.k <= 2**20 else 2
    xla: dict[str, float] = {}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        name = jnp.dtype(dtype).name
        first = jnp.asarray(random.integers(-1, 2, (shape.n, shape.k), np.int8)).astype(dtype)
        weights = [first + jnp.zeros_like(first) for _ in range(copies(first.nbytes, working_set))]
        xla[name] = chained(dense, codes.astype(dtype), weights, xla_length, budget)
    rows = []
    for format in FORMATS:
        one = random_packed(format, shape, 0)
        number = copies(one.codes.nbytes, working_set)
        matrices = [one, *(random_packed(format, shape, seed) for seed in range(1, number))]
        took = chained(packed_matmul, codes, matrices, length, budget)
        choice = choose_implementation(one)
        read = one.codes.nbytes / took
        row: dict[str, Any] = {
            "op": "packed_matmul",
            "format": format,
            **shape._asdict(),
            "threads": threads(),
        }
        row |= {"implementation": choice.name, "isa": choice.isa, "microseconds": took * 1e6}
        row |= {"weight_bytes": one.codes.nbytes, "gbytes_per_second": read / 1e9}
        row["read_ceiling_gbytes_per_second"] = ceiling and ceiling / 1e9
        row["ceiling_fraction"] = ceiling and read / ceiling
        row |= {"gmacs_per_second": products / took / 1e9, "peak_fraction": None}
        row |= {f"speedup_vs_xla_{name}": xla_took / took for name, xla_took in xla.items()}
        rows.append(row)
    return rows


COLUMNS = (
    "format       m      n      k  runs on           us   GB/s  %cl  GMAC/s    faster than XLA f32 bf16 int8"
)


def show(row: dict[str, Any]) -> str:
    """A row as a line under COLUMNS."""
    ceiling = "   -" if row["ceiling_fraction"] is None else f"{100 * row['ceiling_fraction']:4.0f}"
    shape = (
        f"{row['format']:9} {row['m']:4} {row['n']:6} {row['k']:6}  {row['isa'] or row['implementation']:10}"
    )
    speed = (
        f"{row['microseconds']:9.1f} {row['gbytes_per_second']:6.1f} {ceiling} {row['gmacs_per_second']:7.1f}"
    )
    faster = [row[f"speedup_vs_xla_{name}"] for name in ("float32", "bfloat16", "int8")]
    return f"{shape} {speed}         {faster[0]:6.1f} {faster[1]:6.1f} {faster[2]:6.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="all")
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    parser.add_argument("--working-set", type=int, default=256, help="MiB of matrices taken in turn")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each figure")
    options = parser.parse_args(arguments)

    working_set = options.working_set << 20
    ceiling = read_ceiling(working_set, options.seconds)
    told = f"{ceiling / 1e9:.1f} GB/s" if ceiling else f"not measured ({cpu.unavailable()})"
    print(f"{threads()} threads, read ceiling over {options.working_set} MiB: {told}")
    print(COLUMNS)
    rows = []
    for shape in SUITES[options.suite]:
        for row in bench_shape(shape, ceiling, working_set, options.seconds):
            print(show(row), flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
