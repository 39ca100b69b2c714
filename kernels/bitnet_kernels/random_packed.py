"""Random packed matrices of any size for benchmarks, generated at memory speed in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from bitnet_kernels.formats import pack
from bitnet_kernels.packed import FORMATS, PANEL_ROWS, PackedArray

POOL_CODES = 4 << 20  # random codes drawn; their panels are repeated


def random_panels(
    format: str, shape: tuple[int, int], groups: int = 1, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yields the codes uint8 [panels, blocks, 64] of a random valid matrix [n, k] in runs of panels.

    Full panels are repeated from a pool, starting at a position that depends on the seed; a last partial panel is
    packed separately, with zero padding.
    """
    n, k = shape
    whole, rest = divmod(n, PANEL_ROWS)
    if whole:
        pool = _pool(format, min(whole, max(1, POOL_CODES // (PANEL_ROWS * k))) * PANEL_ROWS, k, groups)
        start = int(np.random.default_rng(seed).integers(len(pool)))
        while whole:
            run = pool[start : start + whole]
            yield run
            whole, start = whole - len(run), 0
    if rest:
        yield _pool(format, rest, k, groups)


def random_packed(
    format: str, shape: tuple[int, int], groups: int = 1, seed: int = 0, scale_dtype: str = "float32"
) -> PackedArray:
    """A random valid matrix in memory, with scales and minima 1."""
    codes = np.concatenate(list(random_panels(format, shape, groups, seed)))
    scale = jnp.ones((1, 1) if groups == 1 else (shape[0], groups), scale_dtype)
    minimum = scale + 0 if FORMATS[format].has_minimum else None
    return PackedArray(jnp.asarray(codes), scale, format, "panel16", shape, minimum)


@functools.lru_cache(maxsize=8)
def _pool(format: str, rows: int, k: int, groups: int) -> np.ndarray:
    """The packed bytes of random codes [rows, k]."""
    values = np.array(FORMATS[format].values, np.int8)
    codes = np.random.default_rng(0).choice(values, (rows, k))
    scale = jnp.ones((rows, groups) if groups > 1 else (1, 1), jnp.float32)
    minimum = scale if FORMATS[format].has_minimum else None
    return np.asarray(pack(jnp.asarray(codes), scale, format, minimum=minimum).codes)
