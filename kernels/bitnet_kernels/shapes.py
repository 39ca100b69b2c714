"""Benchmark shapes: matrices [n, k] of real models and realistic row counts m."""

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

IN_CACHE = Shape(1, 512, 2560)  # fits a second-level cache in every format
TINY = Shape(1, 16, 64)

_GPU_MATRICES = ((2560, 2560), (2560, 6912), (8192, 8192), (28672, 8192))
GPU_SUITES: dict[str, tuple[Shape, ...]] = {
    "decode": tuple(Shape(m, n, k) for n, k in _GPU_MATRICES for m in (1, 16)),
    "prefill": tuple(Shape(m, n, k) for n, k in ((6912, 2560), (8192, 8192)) for m in (512, 4096)),
}
GPU_SUITES["all"] = GPU_SUITES["decode"] + GPU_SUITES["prefill"]
GPU_CHECKED = (
    Shape(1, 128, 512),
    Shape(7, 640, 2560),
    Shape(16, 300, 1000),
    Shape(65, 2560, 6912),
    Shape(300, 512, 8192),
)
