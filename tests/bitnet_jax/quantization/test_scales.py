"""Scales: shapes, placements of epsilon, learned gradients, and bit-identical results under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization import scales
from bitnet_jax.quantization.scales import Quantized


def test_dequantize_per_tensor_channel_and_group() -> None:
    codes = jnp.asarray([[1, -1, 2, 3], [0, 1, -2, 1]], jnp.float32)
    np.testing.assert_array_equal(Quantized(codes, jnp.full((1, 1), 0.5)).dequantize(), codes / 2)
    channel = Quantized(codes, jnp.asarray([[2.0], [3]])).dequantize()
    np.testing.assert_array_equal(channel, [[2, -2, 4, 6], [0, 3, -6, 3]])
    groups = Quantized(codes, jnp.asarray([[1.0, 10], [2, 20]])).dequantize()
    np.testing.assert_array_equal(groups, [[1, -1, 20, 30], [0, 2, -40, 20]])


def test_measure_reduces_over_elements_that_share_a_scale() -> None:
    w = jnp.arange(24.0).reshape(2, 12)
    np.testing.assert_array_equal(scales.measure(jnp.max, w, "tensor"), [[23]])
    np.testing.assert_array_equal(scales.measure(jnp.max, w, "channel"), [[11], [23]])
    np.testing.assert_array_equal(scales.measure(jnp.max, w, 4), [[3, 7, 11], [15, 19, 23]])
    np.testing.assert_array_equal(scales.measure(jnp.median, w, 6), [[2.5, 8.5], [14.5, 20.5]])


@pytest.mark.unchecked_annotations
@pytest.mark.parametrize("granularity", [5, 0, -4, 24, "row", 2.0])
def test_measure_rejects_other_granularities(granularity) -> None:
    with pytest.raises(
        ValueError, match=r"got .* for weights with 12 inputs, expected 'tensor', 'channel' or"
    ):
        scales.measure(jnp.mean, jnp.ones((2, 12)), granularity)


def test_spread_rejects_group_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="got 5 along an axis of 12, expected a divisor of 12"):
        scales.spread(jnp.ones((2, 5)), 12)


@pytest.mark.parametrize(
    ("epsilon", "divisor", "multiplier"),
    [
        ("clamp", [0.25, 0.5], [0.25, 0.5]),
        ("add", [0.25, 0.75], [0.25, 0.75]),
        ("divisor", [0.25, 0.75], [0, 0.5]),
    ],
)
def test_the_three_placements_of_epsilon(epsilon: str, divisor: list, multiplier: list) -> None:
    got = scales.guarded(jnp.asarray([0, 0.5]), 0.25, epsilon)
    np.testing.assert_array_equal(got[0], divisor)
    np.testing.assert_array_equal(got[1], multiplier)


def test_guarded_rejects_other_names() -> None:
    with pytest.raises(ValueError, match="epsilon: got 'inside'"):
        scales.guarded(jnp.ones(1), 1e-5, "inside")


def test_floor_and_gradient_factor_of_learned_scales() -> None:
    scale = jnp.asarray([[0.5], [1e-5], [0.0], [-3.0], [jnp.nan]])
    value, pull = jax.vjp(lambda s: scales.learned(s, 100, 7), scale)
    np.testing.assert_array_equal(value, np.float32([[0.5], [1e-5], [1e-5], [1e-5], [np.nan]]))
    # LSQ's factor, including below the floor, where a clipped gradient would leave the scale stuck.
    np.testing.assert_array_equal(
        pull(jnp.full((5, 1), 2.0))[0], np.full((5, 1), 2 / np.sqrt(700), np.float32)
    )


def test_reciprocal_is_bit_identical_under_jit() -> None:
    m = np.random.default_rng(0).uniform(1e-3, 4, (4096, 1)).astype(np.float32)
    expected = np.float32(1) / (np.float32(127) / m)
    quantize = lambda m: scales.reciprocal(127 / m)  # noqa: E731
    np.testing.assert_array_equal(quantize(jnp.asarray(m)), expected)
    np.testing.assert_array_equal(jax.jit(quantize)(m), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(quantize))(m), expected)
    assert (expected != m / np.float32(127)).any()  # the sample contains values on which the two could differ


def test_a_measured_mean_is_rounded_before_it_is_multiplied() -> None:
    w = jnp.asarray(np.random.default_rng(1).uniform(0, 1, (512, 100)), jnp.float32)
    scaled = lambda w: scales.measure(jnp.mean, w, "channel") * 7**-0.5  # noqa: E731
    expected = np.asarray(jnp.mean(w, axis=-1, keepdims=True)) * np.float32(7**-0.5)
    np.testing.assert_array_equal(scaled(w), expected)
    np.testing.assert_array_equal(jax.jit(scaled)(w), expected)


def test_nearest_odd_cells_are_half_open() -> None:
    z = jnp.asarray([-9, -4, -2.001, -2, -1e-6, -0.0, 0, 1.999, 2, 3.9, 9, jnp.inf, jnp.nan])
    expected = [-3, -3, -3, -1, -1, 1, 1, 1, 3, 3, 3, 3, np.nan]
    np.testing.assert_array_equal(scales.nearest_odd(3)(z), expected)


@pytest.mark.parametrize("ste", ["identity", "clipped"])
def test_round_scaled_has_lsq_gradients(ste: str) -> None:
    # scale 0.5; z = x / scale includes both end points, which count as inside.
    z = np.array([[-9, -8, -7.6, -0.5, -0.0, 0.3, 2.5, 7, 7.4, 20]], np.float32)
    g = np.arange(1, 11, dtype=np.float32)[None]
    x, scale = jnp.asarray(z / 2), jnp.full((1, 1), 0.5)
    codes = np.clip(np.round(z), -8, 7)
    inside = (z >= -8) & (z <= 7)

    def dequantized(x, scale):
        return scales.round_scaled(x, scale, scales.nearest(-8, 7), -8, 7, ste) * scale

    value, pull = jax.vjp(dequantized, x, scale)
    to_x, to_scale = pull(jnp.asarray(g))
    np.testing.assert_array_equal(value, codes / 2)
    np.testing.assert_array_equal(to_x, g * inside if ste == "clipped" else g)
    per_element = np.where(inside, codes - z, codes)
    np.testing.assert_allclose(to_scale, (g * per_element).sum(keepdims=True), rtol=1e-6)


def test_round_scaled_scale_gradient_by_finite_differences() -> None:
    """With every value outside the grid the codes are constant, and the LSQ gradient is the true derivative."""
    x, scale = jnp.asarray([[-9.0, 9, 20, -30]]), jnp.full((1, 1), 0.5)
    loss = lambda s: (scales.round_scaled(x, s, scales.nearest(-8, 7), -8, 7, "clipped") * s).sum()  # noqa: E731
    numerical = (loss(scale + 0.01) - loss(scale - 0.01)) / 0.02
    np.testing.assert_allclose(
        jax.grad(loss)(scale).item(), numerical, rtol=1e-4
    )  # float32 difference quotient


def test_round_scaled_edge_replaces_the_outer_gradient() -> None:
    x, scale = jnp.asarray([[-9.0, 0.1, 9]]), jnp.full((1, 1), 1.0)
    loss = lambda s: (scales.round_scaled(x, s, scales.nearest(-1, 1), -1, 1, "clipped", (-2, 2)) * s).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(scale).item(), -2 + (0 - 0.1) + 2, rtol=1e-5)
