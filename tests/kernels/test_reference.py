"""The definitions themselves, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import FORMATS, reference

pytestmark = pytest.mark.optimized


def test_activations_are_quantized_by_the_formula() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    s = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    for quantize in (reference.quantize_activations, jax.jit(reference.quantize_activations)):
        codes, scale = quantize(x)
        np.testing.assert_array_equal(codes, np.clip(np.rint(x * s), -128, 127).astype(np.int8))
        np.testing.assert_array_equal(scale, np.float32(1) / s)
        assert (codes.dtype, scale.shape) == (np.int8, (3, 5, 1))


def test_rounding_is_half_to_even_and_the_largest_is_127() -> None:
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -126.5]])
    codes, scale = reference.quantize_activations(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -126]]
    assert scale.tolist() == [[1.0]]


def test_a_zero_row_gives_zeros_and_a_row_with_nan_gives_nan() -> None:
    codes, scale = reference.quantize_activations(jnp.array([[0.0, 0.0], [jnp.nan, 1.0]]))
    assert codes[0].tolist() == [0, 0]
    assert np.isfinite(scale[0, 0])
    assert np.isnan(scale[1, 0])


@pytest.mark.extended(after=len(FORMATS))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k", "groups"), [(5, 7, 1), (16, 96, 3), (3, 2**17 + 5, 1)])
def test_integer_matmul_is_exact(make_packed, format: str, n: int, k: int, groups: int) -> None:
    codes, w = make_packed(
        format, n, k, groups
    )  # the long one exceeds 2^24, where float32 integers are no longer exact
    x = np.random.default_rng(1).integers(-128, 128, (4, k), np.int8)
    x[0], x[1] = 127, np.where(codes[0] == 1, -128, 127)
    expected = np.einsum(
        "mgk,ngk->gmn", x.reshape(4, groups, -1).astype(float), codes.reshape(n, groups, -1).astype(float)
    )
    sums = reference.integer_matmul(jnp.asarray(x), w)
    assert sums.dtype == np.int32
    np.testing.assert_array_equal(sums, expected)


def test_float_matmul_is_the_product_per_group(make_packed) -> None:
    codes, w = make_packed("ternary2", 9, 64, 2)
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    expected = np.einsum("mgk,ngk->gmn", x.reshape(4, 2, 32), codes.reshape(9, 2, 32).astype(np.float32))
    # float32 sums of 32 terms of magnitude 1 in a different order
    np.testing.assert_allclose(reference.float_matmul(jnp.asarray(x), w), expected, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_rescale_rounds_every_product_and_sum_in_order(groups: int) -> None:
    random = np.random.default_rng(groups)
    sums = random.integers(-(2**20), 2**20, (groups, 33, 64)).astype(np.int32)
    scale = random.normal(size=(64, groups)).astype(np.float32)
    expected = sums[0].astype(np.float32) * scale[:, 0]
    for g in range(1, groups):
        expected = expected + sums[g].astype(np.float32) * scale[:, g]
    np.testing.assert_array_equal(reference.rescale(jnp.asarray(sums), jnp.asarray(scale)), expected)
    np.testing.assert_array_equal(jax.jit(reference.rescale)(sums, scale), expected)  # no fused multiply-add


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rescale_adds_the_minimum_times_the_sums_of_x_to_each_group(groups: int, dtype: str) -> None:
    random = np.random.default_rng(groups)
    sums = random.integers(-(2**20), 2**20, (groups, 33, 64)).astype(np.int32)
    x_sums = random.integers(-(2**12), 2**12, (groups, 33)).astype(np.int32)
    scale, minimum = (random.normal(size=(64, groups)).astype(dtype) for _ in range(2))
    expected = np.full((33, 64), -0.0, np.float32)
    for g in range(groups):
        term = sums[g].astype(np.float32) * scale[:, g].astype(np.float32)
        term = term + x_sums[g].astype(np.float32)[:, None] * minimum[:, g].astype(np.float32)
        expected = expected + term
    np.testing.assert_array_equal(reference.rescale(sums, scale, minimum, x_sums), expected)
    np.testing.assert_array_equal(jax.jit(reference.rescale)(sums, scale, minimum, x_sums), expected)
