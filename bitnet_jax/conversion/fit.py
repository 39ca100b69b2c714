"""The scale and codes of a symmetric grid that are nearest to given weights, exactly.

A grid has the levels +-m for each magnitude m. For weights w, importances c > 0 and codes t on the grid, the best scale
is a = sum(c w t) / sum(c t^2), and then sum(c (w - a t)^2) = sum(c w^2) - sum(c w t)^2 / sum(c t^2). For a given scale
the best codes are the nearest ones. As the scale falls from infinity, each |w| passes the midpoints between magnitudes
one after the other, at |w| / midpoint; these events, sorted, list all codes that are nearest ones for some scale, and
running sums give the error of each. For three levels this is: sort |w|, keep the largest of them, and scale by their
mean.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int8

from bitnet_jax.conversion.grids import Grid
from bitnet_jax.quantization.scales import SMALLEST_SCALE, Granularity

MOST_MAGNITUDES = 16  # of a grid whose scale is searched; each weight has an event for every one of them


def best_scale(
    w: Float[np.ndarray, "*rows g"], importance: Float[np.ndarray, "*rows g"], grid: Grid
) -> Float[np.ndarray, "*rows"]:
    """The scale that minimizes sum(importance (w - scale codes)^2) over scales and codes; at least SMALLEST_SCALE.

    Of a grid of more than MOST_MAGNITUDES it is max|w| over the largest of them: it cuts nothing off, and the best one
    is hardly smaller.

    Args:
      w: the weights that share a scale, along the last axis.
      importance: positive, broadcasts to w.
    """
    size, c, m = np.abs(w), np.broadcast_to(importance, w.shape), grid.magnitudes
    if len(m) > MOST_MAGNITUDES:
        return np.maximum(size.max(axis=-1) / m[-1], SMALLEST_SCALE)
    # From the largest scale on, with the smallest magnitude everywhere, to the events in their order.
    products = [m[0] * np.sum(c * size, axis=-1, keepdims=True, dtype=np.float64)]
    squares = [m[0] ** 2 * np.sum(c, axis=-1, keepdims=True, dtype=np.float64)]
    steps = list(zip(m[:-1], m[1:], strict=True))
    if steps:
        passed = np.concatenate([size / ((low + high) / 2) for low, high in steps], axis=-1)
        order = np.argsort(-passed, axis=-1)
        product = np.concatenate([(high - low) * c * size for low, high in steps], axis=-1)
        square = np.concatenate([(high**2 - low**2) * c for low, high in steps], axis=-1)
        products.append(np.take_along_axis(product, order, axis=-1))
        squares.append(np.take_along_axis(square, order, axis=-1))
    numerator, denominator = (
        np.cumsum(np.concatenate(parts, axis=-1), axis=-1, dtype=np.float64) for parts in (products, squares)
    )
    gain = np.divide(numerator**2, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    best = np.argmax(gain, axis=-1)[..., None]
    top, bottom = (np.take_along_axis(sums, best, axis=-1)[..., 0] for sums in (numerator, denominator))
    scale = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return np.maximum(scale, SMALLEST_SCALE)


def fitted_scale(
    w: Float[np.ndarray, "n k"], importance: Float[np.ndarray, "k"], grid: Grid, granularity: Granularity
) -> Float[np.ndarray, "#n G"]:
    """`best_scale` of all weights that share a scale, float32, in the shape of quantization/scales.py."""
    n, k = w.shape
    if granularity == "tensor":
        return best_scale(w.reshape(1, -1), np.tile(importance, n)[None], grid).astype(np.float32)[:, None]
    size = granularity if isinstance(granularity, int) else k
    return best_scale(w.reshape(n, -1, size), importance.reshape(1, -1, size), grid).astype(np.float32)


def nearest_codes(
    w: Float[np.ndarray, "*rows"], scale: Float[np.ndarray, "*rows"], grid: Grid
) -> Int8[np.ndarray, "*rows"]:
    """The codes of the grid nearest to w / scale; of two as near, the smaller magnitude, and of signs +1."""
    m = np.asarray(grid.magnitudes, np.int8)
    index = np.searchsorted((m[:-1] + m[1:].astype(np.float64)) / 2, np.abs(w) / scale, side="left")
    return np.where(w < 0, -m[index], m[index])
