"""Shapes that matter, as data: matrices [n, k] of real models and rows m of real use, for benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """x [m, k] times the transpose of a matrix [n, k]."""

    m: int
    n: int
    k: int


# BitNet b1.58 2B-4T: query and output, key and value, gate and up, down; then a layer of a 70B model.
MATRICES = ((2560, 2560), (640, 2560), (6912, 2560), (2560, 6912), (8192, 8192))

SUITES: dict[str, tuple[Shape, ...]] = {
    "decode": tuple(Shape(1, n, k) for n, k in MATRICES),
    "prefill": tuple(Shape(m, n, k) for m in (8, 128) for n, k in MATRICES[:1] + MATRICES[2:4]),
}
SUITES["all"] = SUITES["decode"] + SUITES["prefill"]
SUITES["smoke"] = (Shape(1, 256, 512), Shape(4, 256, 512))

IN_CACHE = Shape(1, 512, 2560)  # in a second-level cache in every format
TINY = Shape(1, 16, 64)
