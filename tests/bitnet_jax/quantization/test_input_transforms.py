"""Input transforms: Hadamard rotation and top-k sparsity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitnet_jax.quantization.input_transforms import hadamard, top_k

X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)


def test_hadamard_matrix() -> None:
    h2 = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    h8 = np.kron(h2, np.kron(h2, h2))
    np.testing.assert_allclose(hadamard(jnp.eye(8)), h8, rtol=1e-6)
    np.testing.assert_allclose(hadamard(jnp.asarray(X)), X @ h8, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hadamard(jnp.asarray([[3.0]])), [[3.0]])


def test_hadamard_is_its_own_inverse_and_gradient() -> None:
    x = jnp.asarray(np.random.default_rng(7).standard_normal((2, 3, 64)), jnp.float32)
    y = hadamard(x)
    np.testing.assert_allclose(hadamard(y), x, atol=2e-6)  # a depth of 12 additions, values up to 4
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    g = jnp.roll(x, 1, axis=-1)
    np.testing.assert_allclose(jax.vjp(hadamard, x)[1](g)[0], hadamard(g), atol=2e-6)
    np.testing.assert_array_equal(jax.jit(jax.vmap(hadamard))(x), y)


def test_hadamard_spreads_an_outlier() -> None:
    x = jnp.zeros((1, 64)).at[0, 5].set(8.0)
    np.testing.assert_allclose(jnp.abs(hadamard(x)), np.ones((1, 64)), rtol=1e-6)


def test_hadamard_of_widths_that_are_not_powers_of_two() -> None:
    x = jnp.arange(24.0).reshape(2, 12)
    with pytest.raises(ValueError, match="got an axis of 12, expected a power of two; .*blocks of 4"):
        hadamard(x)
    blocks = hadamard(x.reshape(2, 3, 4)).reshape(2, 12)
    np.testing.assert_array_equal(hadamard(x, block=True), blocks)


def test_top_k_keeps_the_largest_and_passes_all_gradients() -> None:
    x = jnp.asarray([[0.1, -5.0, 2.0, 3.0], [4.0, 0.0, -0.5, 1.0]])
    np.testing.assert_array_equal(top_k(x, 0.5), [[0, -5, 0, 3], [4, 0, 0, 1]])
    np.testing.assert_array_equal(top_k(x, 0.1), [[0, -5, 0, 0], [4, 0, 0, 0]])  # at least one
    np.testing.assert_array_equal(top_k(x, 1.0), x)
    by = jnp.asarray([[1.0, 0, 0, 2], [0, 1, 2, 0]])
    np.testing.assert_array_equal(top_k(x, 0.5, by=by), np.float32([[0.1, 0, 0, 3], [0, 0, -0.5, 0]]))
    g = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(jax.vjp(lambda x: top_k(x, 0.25), x)[1](g)[0], g)
    masked = jax.vjp(lambda x: top_k(x, 0.25, ste="masked"), x)[1](g)[0]
    np.testing.assert_array_equal(masked, [[0, 1, 0, 0], [4, 0, 0, 0]])
    with pytest.raises(ValueError, match="STE of top_k: got 'none', expected one of identity, masked"):
        top_k(x, 0.25, ste="none")


@settings(deadline=None)
@given(
    # Few shapes and fractions, because each one compiles.
    x=arrays(np.float32, st.sampled_from([(1, 1), (3, 2), (2, 9), (3, 40)]), elements=st.floats(width=32)),
    fraction=st.sampled_from([0.01, 0.34, 0.5, 0.75, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_top_k_finds_the_same_threshold_as_a_sort(x: np.ndarray, fraction: float, dtype: str) -> None:
    values = jnp.asarray(x).astype(dtype)
    size = np.abs(np.asarray(values, np.float32))
    keep = max(1, round(fraction * x.shape[-1]))
    threshold = np.sort(size, axis=-1)[:, -keep, None]
    expected = np.where(size < threshold, 0, np.asarray(values, np.float32))
    got = jax.jit(top_k, static_argnums=1)(values, fraction)  # its loop would be recompiled in every call
    np.testing.assert_array_equal(np.asarray(got, np.float32), expected)


def test_top_k_ties_nan_and_invalid_fractions() -> None:
    np.testing.assert_array_equal(top_k(jnp.asarray([[1.0, -1, 1, 0.5]]), 0.25), [[1, -1, 1, 0]])
    assert np.isnan(top_k(jnp.asarray([[1.0, jnp.nan, 2, 3]]), 0.5)[0, 1])
    for fraction in (0.0, 1.5, -0.5):
        with pytest.raises(ValueError, match="top_k fraction: got .*, expected 0 < fraction <= 1"):
            top_k(jnp.asarray(X), fraction)
