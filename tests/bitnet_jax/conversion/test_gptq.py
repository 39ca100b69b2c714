"""GPTQ: the factor, a hand-checked compensation, and a smaller output error than that of nearest codes."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_jax.conversion.fit import fitted_scale, nearest_codes
from bitnet_jax.conversion.gptq import BLOCK, Rounded, compensate, inverse_factor, output_error, refitted
from bitnet_jax.conversion.grids import GRIDS


def moment(k: int, tokens: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, k)) @ rng.normal(size=(k, k))
    return x.T @ x / tokens


def test_the_factor_is_that_of_the_inverse() -> None:
    H = moment(5, 20)
    U, damping = inverse_factor(H, 0.01)
    assert damping == 0.01
    assert not np.tril(U, -1).any()
    np.testing.assert_allclose(U.T @ U, np.linalg.inv(H + 0.01 * np.trace(H) / 5 * np.eye(5)), rtol=1e-9)


def test_a_singular_moment_is_damped_and_that_is_said() -> None:
    H = np.ones((4, 4))
    H[0, 0] -= 1e-3  # indefinite
    U, damping = inverse_factor(H, 1e-9)
    assert 1e-9 < damping < 0.1
    assert np.isfinite(U).all()
    assert np.isfinite(inverse_factor(np.zeros((4, 4)))[0]).all()  # inputs that are always 0


def test_a_moment_with_nan_is_refused() -> None:
    H = moment(4, 9)
    H[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite inputs"):
        inverse_factor(H)


def test_the_second_column_takes_up_the_error_of_the_first_by_hand() -> None:
    """With H = [[1, 1/2], [1/2, 1]] an error d of the first weight is best met by d/2 in the second."""
    H, w = np.array([[1, 0.5], [0.5, 1]]), np.array([[1, -0.2]], np.float32)
    U, _ = inverse_factor(H, 0)
    np.testing.assert_allclose(U, [[np.sqrt(4 / 3), -np.sqrt(1 / 3)], [0, 1]], atol=1e-12)
    done = compensate(w, U, GRIDS["binary"], "channel")
    # Importances 1 / U_jj^2 = 3/4 and 1: the scale is (3/4 + 0.2) / (7/4) = 0.5429. The error 0.4571 of the first moves
    # the second from -0.2 to 0.0286: its sign turns.
    assert done.scale[0, 0] == pytest.approx(0.95 / 1.75)
    assert done.codes.tolist() == [[1, 1]]
    q = done.scale[0, 0]
    assert output_error(w, np.array([[q, q]]), H) < output_error(w, np.array([[q, -q]]), H)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 32, 96])
@pytest.mark.parametrize("name", ["binary", "ternary", "4"])
def test_the_error_of_the_output_falls(name: str, granularity: str | int) -> None:
    grid, rng = GRIDS[name], np.random.default_rng(3)
    k = 2 * 96
    assert k % BLOCK == 0
    w, H = rng.normal(size=(24, k)).astype(np.float32), moment(k, 4 * k)
    scale = fitted_scale(w, np.ones(k), grid, granularity)
    wide = np.repeat(scale, k // scale.shape[1], axis=1)
    plain = nearest_codes(w, np.broadcast_to(wide, w.shape), grid) * wide
    done = compensate(w, inverse_factor(H)[0], grid, granularity)
    assert done.scale.shape == scale.shape
    errors = [
        output_error(w, one.codes * np.repeat(one.scale, k // scale.shape[1], axis=1), H)
        for one in (refitted(w, done, H, damping=0), done)
    ]
    assert errors == sorted(errors)
    assert errors[1] < output_error(w, plain, H)


def test_without_correlations_nothing_is_compensated() -> None:
    w = np.random.default_rng(4).normal(size=(6, 64)).astype(np.float32)
    done = compensate(w, inverse_factor(np.eye(64))[0], GRIDS["ternary"], 32)
    scale = fitted_scale(w, np.ones(64), GRIDS["ternary"], 32)
    np.testing.assert_allclose(done.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(
        done.codes, nearest_codes(w, np.repeat(scale, 32, axis=1), GRIDS["ternary"])
    )


def test_scales_for_given_codes_by_hand() -> None:
    """Two groups of one input: a row of codes 1, 1 can be any weights, so its scales are the weights."""
    H, w = np.array([[1, 0.5], [0.5, 1]]), np.array([[3, 2], [3, -2]], np.float32)
    codes = np.ones((2, 2), np.int8)
    old = np.full((2, 2), 9, np.float32)
    # The second row would need a scale of -2, so it keeps its own.
    np.testing.assert_allclose(refitted(w, Rounded(codes, old), H, 0).scale, [[3, 2], [9, 9]], rtol=1e-5)
    # One scale a row: t H w / t H t = (3 + 1 + 1.5 + 2) / 3.
    of_row = refitted(w[:1], Rounded(codes[:1], old[:1, :1]), H, 0).scale
    np.testing.assert_allclose(of_row, [[2.5]], rtol=1e-5)
    # One for both rows: the second has t H w = 3 - 1 + 1.5 - 2.
    of_both = refitted(w, Rounded(codes, old[:1, :1]), H, 0).scale
    np.testing.assert_allclose(of_both, [[(7.5 + 1.5) / 6]], rtol=1e-5)
