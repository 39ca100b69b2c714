"""Fits of scales: hand-checked examples, and no codes and scales of a grid have a smaller error."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.conversion.fit import MOST_MAGNITUDES, best_scale, fitted_scale, nearest_codes
from bitnet_jax.conversion.grids import GRIDS
from bitnet_jax.quantization.scales import SMALLEST_SCALE

TERNARY, BINARY = GRIDS["ternary"], GRIDS["binary"]


def test_three_levels_by_hand() -> None:
    w = np.array([3, 1, -2, 0.1], np.float32)
    # The largest 1, 2, 3 and 4 of them explain 9, 5^2/2, 6^2/3 and 6.1^2/4: two are kept, with their mean.
    scale = best_scale(w, np.ones(4), TERNARY)
    assert scale == 2.5
    assert nearest_codes(w, scale, TERNARY).tolist() == [1, 0, -1, 0]


def test_two_levels_by_hand() -> None:
    w = np.array([3, 1, -2, 0], np.float32)
    assert best_scale(w, np.ones(4), BINARY) == 1.5  # the mean magnitude
    assert nearest_codes(w, np.float32(1.5), BINARY).tolist() == [1, 1, -1, 1]


def test_importance_by_hand() -> None:
    w, importance = np.array([2, 1], np.float32), np.array([1, 9])
    # Alone 2 explains 2^2/1 of sum(c w^2); both explain (2 + 9)^2 / (1 + 9).
    assert best_scale(w, importance, TERNARY) == pytest.approx(1.1)
    assert best_scale(w, importance, BINARY) == pytest.approx(1.1)


@pytest.mark.parametrize("name", [name for name in GRIDS if len(GRIDS[name].magnitudes) <= MOST_MAGNITUDES])
def test_no_codes_and_scale_have_a_smaller_error(name: str) -> None:
    grid, rng = GRIDS[name], np.random.default_rng(0)
    levels = sorted({sign * m for m in grid.magnitudes for sign in (-1, 1)})
    every = np.array(list(itertools.product(levels, repeat=3 if len(levels) > 4 else 5)))
    for _ in range(10):
        w, c = rng.normal(size=every.shape[1]), rng.uniform(0.1, 2, every.shape[1])
        squares = (c * every**2).sum(axis=1)
        scales = np.divide((c * w * every).sum(axis=1), squares, out=np.zeros(len(every)), where=squares > 0)
        least = ((w - scales[:, None] * every) ** 2 @ c).min()
        scale = best_scale(w, c, grid)
        codes = nearest_codes(w, scale, grid)
        assert set(codes.tolist()) <= set(levels)
        assert c @ (w - scale * codes) ** 2 == pytest.approx(least, rel=1e-9)


def test_the_scale_of_many_levels_cuts_nothing_off() -> None:
    w = np.array([[254, -1, 3, 0]], np.float32)
    scale = best_scale(w, np.ones(4), GRIDS["8"])
    assert scale.tolist() == [2]
    assert nearest_codes(w, scale[:, None], GRIDS["8"]).tolist() == [[127, 0, 1, 0]]


def test_granularities_share_what_they_say() -> None:
    rng = np.random.default_rng(1)
    w, c = rng.normal(size=(3, 64)).astype(np.float32), rng.uniform(1, 2, 64)
    groups = fitted_scale(w, c, TERNARY, 32)
    assert groups.shape == (3, 2)
    assert groups[1, 1] == np.float32(best_scale(w[1, 32:], c[32:], TERNARY))
    assert fitted_scale(w, c, TERNARY, "channel")[2, 0] == np.float32(best_scale(w[2], c, TERNARY))
    whole = fitted_scale(w, c, TERNARY, "tensor")
    assert whole.shape == (1, 1)
    assert whole[0, 0] == np.float32(best_scale(w.reshape(-1), np.tile(c, 3), TERNARY))


@pytest.mark.parametrize("name", GRIDS)
def test_codes_times_scale_quantize_to_themselves(name: str) -> None:
    """What packing and training see is exactly what was fitted, zeros included."""
    grid, rng = GRIDS[name], np.random.default_rng(2)
    w = rng.normal(size=(8, 64)).astype(np.float32)
    w[:2] = 0
    w[2] *= 1e-9
    scale = fitted_scale(w, np.ones(64), grid, 32)
    assert scale.min() == np.float32(SMALLEST_SCALE)
    codes = nearest_codes(w, np.repeat(scale, 32, axis=1), grid)
    values = jnp.asarray(codes * np.repeat(scale, 32, axis=1))
    again = grid.precision(32, "int8").quantize_weight(values, jnp.asarray(scale))
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.scale, scale)
