"""GPTQ: columns are rounded one after the other, and the columns that follow take up the error of each.

For a layer y = x W^T with inputs of second moment H = mean(x^T x), the error of the output is tr(E H E^T), E = W - Q.
With the upper triangular U of inv(H) = U^T U, the error e_j = (w_j - q_j) / U_jj of column j, once rounded, costs
sum(e_j^2), and the columns after it are best changed by -e_j U[j, j+1:] (2210.17323).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int8

from bitnet_jax.conversion.fit import best_scale, fitted_scale, nearest_codes
from bitnet_jax.conversion.grids import Grid
from bitnet_jax.quantization.scales import SMALLEST_SCALE, Granularity

DAMPING = 0.01  # of the mean of the diagonal of H
BLOCK = (
    64  # columns whose errors reach the columns after them in one product, unless a scale has its own block
)


class Rounded(NamedTuple):
    codes: Int8[np.ndarray, "n k"]
    scale: Float[np.ndarray, "#n G"]  # float32

    def dequantized(self) -> Float[np.ndarray, "n k"]:
        return self.codes.astype(np.float32) * widened(self.scale, self.codes.shape[1])


def widened(scale: Float[np.ndarray, "#n G"], k: int) -> Float[np.ndarray, "#n k"]:
    """The scale of each of k inputs."""
    return np.repeat(scale, k // scale.shape[1], axis=1)


def inverse_factor(
    moment: Float[np.ndarray, "k k"], damping: float = DAMPING
) -> tuple[Float[np.ndarray, "k k"], float]:
    """U, upper triangular, of inv(moment + damping mean(diagonal) I) = U^T U, float64; and the damping that it took.

    A moment that is singular all the same (more inputs than tokens, inputs that are always 0) is damped tenfold until
    it is not.

    Raises:
      ValueError: the moment has NaN or infinity.
    """
    if not np.isfinite(moment).all():
        raise ValueError("got NaN or infinite inputs from the calibration text, expected finite ones")
    k = len(moment)
    mean = float(np.trace(moment)) / k or 1.0
    while True:
        damped = moment.astype(np.float64) + damping * mean * np.eye(k)
        try:
            # Reversed twice, a lower factor is an upper one: damped = R R^T, so inv(damped) = inv(R)^T inv(R).
            R = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        return scipy.linalg.solve_triangular(R, np.eye(k)), damping


def compensate(
    w: Float[np.ndarray, "n k"], factor: Float[np.ndarray, "k k"], grid: Grid, granularity: Granularity
) -> Rounded:
    """Codes and scales by GPTQ; scales of groups are fitted when their group is reached, to what is left by then.

    Args:
      factor: U of `inverse_factor`. An error of column j costs its square over U_jj^2, by which scales are fitted.
    """
    left, (n, k) = np.array(w.T, np.float32, order="C"), w.shape  # [k, n]: columns of w are contiguous
    factor, importance = factor.astype(np.float32), (1 / np.diag(factor) ** 2).astype(np.float32)
    grouped = isinstance(granularity, int)
    width = granularity if isinstance(granularity, int) else BLOCK
    codes = np.zeros((k, n), np.int8)
    scale = (
        np.zeros((n, k // width), np.float32) if grouped else fitted_scale(w, importance, grid, granularity)
    )
    for start in range(0, k, width):
        stop = min(start + width, k)
        if grouped:
            scale[:, start // width] = best_scale(left[start:stop].T, importance[None, start:stop], grid)
        of_column = scale[:, start // width] if grouped else scale[:, 0]
        errors = np.zeros((stop - start, n), np.float32)
        for j in range(start, stop):
            codes[j] = nearest_codes(left[j], of_column, grid)
            errors[j - start] = (left[j] - codes[j] * of_column) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j - start]
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return Rounded(np.ascontiguousarray(codes.T), scale)


def refitted(
    w: Float[np.ndarray, "n k"], rounded: Rounded, moment: Float[np.ndarray, "k k"], damping: float = DAMPING
) -> Rounded:
    """The scales with the least error of the output for given codes: linear least squares.

    With codes t_g of group g and 0 elsewhere, the scales a of a row w solve sum_h (t_g H t_h^T) a_h = t_g H w^T, with H
    damped as in `inverse_factor`. One scale for several rows solves the sum of their equations. A row keeps its scales
    if one would not be above SMALLEST_SCALE.
    """
    (n, k), groups = w.shape, rounded.scale.shape[1]
    H = moment.astype(np.float32)
    H[np.diag_indices(k)] += damping * np.trace(moment) / k
    t, size = rounded.codes.astype(np.float32), k // groups
    left, right = np.zeros((n, groups, groups)), np.zeros((n, groups))
    of_w = w @ H
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        left[:, g] = ((t[:, part] @ H[part]) * t).reshape(n, groups, size).sum(axis=-1)
        right[:, g] = (of_w[:, part] * t[:, part]).sum(axis=-1)
    if len(rounded.scale) == 1:
        left, right = left.sum(axis=0, keepdims=True), right.sum(axis=0, keepdims=True)
    ridge = 1e-6 * np.trace(left, axis1=1, axis2=2)[:, None, None] / groups + 1e-30  # for groups of zeros
    scale = np.linalg.solve(left + ridge * np.eye(groups), right[..., None])[..., 0]
    positive = (scale > SMALLEST_SCALE).all(axis=1, keepdims=True)
    return Rounded(rounded.codes, np.where(positive, scale, rounded.scale).astype(np.float32))


def output_error(
    w: Float[np.ndarray, "n k"],
    rounded: Float[np.ndarray, "n k"],
    moment: Float[np.ndarray, "k k"] | None = None,
) -> float:
    """tr(E H E^T) / tr(W H W^T): the error of the output relative to the output. H is I by default."""
    e = w - rounded
    if moment is None:
        weighted, total = e, w
    else:
        H = moment.astype(np.float32)
        weighted, total = e @ H, w @ H
    size = float(np.sum(total * w, dtype=np.float64))
    return float(np.sum(weighted * e, dtype=np.float64)) / size if size else 0.0
