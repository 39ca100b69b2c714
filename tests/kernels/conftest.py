"""Random packed matrices with the codes they were packed from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bitnet_kernels import FORMATS, PackedArray, pack

MakePacked = Callable[..., tuple[np.ndarray, PackedArray]]


@pytest.fixture
def make_packed() -> MakePacked:
    def make(
        format: str, n: int, k: int, groups: int = 1, seed: int = 0, scale_dtype: str = "float32"
    ) -> tuple[np.ndarray, PackedArray]:
        """(int8 codes [n, k], the same codes packed with random scales, and minima, per output and group)."""
        random = np.random.default_rng(seed)
        codes = random.choice(np.array(FORMATS[format].values, np.int8), (n, k))
        scale = random.uniform(0.1, 2.0, (n, groups)).astype(scale_dtype)
        minimum = random.normal(size=(n, groups)).astype(scale_dtype)
        return codes, pack(codes, scale, format, minimum=minimum if FORMATS[format].has_minimum else None)

    return make
