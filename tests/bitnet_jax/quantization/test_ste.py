"""Straight-through estimators: values and slopes against their formulas, on a grid with every edge case."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization import ste

# Powers of two and their neighbours make the window edges exact; 1e-40 is subnormal.
EDGES = np.array(
    [
        *(0.0, -0.0, 1e-40, -1e-40, 1e-30, -1e-30, 0.05, 0.1, -0.1, 0.25, -0.25, 0.5, -0.5, 0.75, 1.2, -1.2),
        *(1.0, -1.0, np.nextafter(1, 2), np.nextafter(1, 0), -np.nextafter(1, 2), 1.5, -1.5, 2.5, -2.5),
        *(7.9, 8.1, 100.0, -100.0, 1e30, -1e30, np.inf, -np.inf, np.nan),
    ],
    np.float32,
)


def expected_slope(name: str, z: np.ndarray, progress: float) -> np.ndarray:
    """h(z) from the formula in float64; the caller handles NaN inputs."""
    z = z.astype(np.float64)
    size = np.abs(z)
    with np.errstate(all="ignore"):
        if name == "identity":
            return np.ones_like(z)
        if name == "clipped":
            return np.where(size <= 1, 1.0, 0.0)
        if name == "approx_sign":
            return np.where(size <= 1, 2 - 2 * size, 0.0)
        if name == "swish_sign":
            u = 5 * z
            slope = 5 * (2 - u * np.tanh(u / 2)) / (1 + np.cosh(u))
            return np.where(size < 100, slope, 0.0)  # beyond, inf / inf; the limit is 0
        if name == "tanh":
            t = 1e-3 * 10 ** (progress * np.log10(10 / 1e-3))
            return max(1 / t, 1) * t * (1 - np.tanh(t * z) ** 2)
        if name == "reste":
            order = 1 + (1 - np.cos(np.pi / 2 * progress)) * (3 - 1)
            power = size ** ((1 - order) / order) / order
            slope = np.where(size <= np.float32(0.1), 0.1 ** (1 / order) / 0.1, power)
            return np.where(size <= 1.5, slope, 0.0)
    raise AssertionError(name)


def backward(step, z: np.ndarray, g: np.ndarray) -> np.ndarray:
    return np.asarray(jax.vjp(step, jnp.asarray(z))[1](jnp.asarray(g))[0])


@pytest.mark.parametrize("zero", [1, -1])
def test_sign_forward(zero: int) -> None:
    tiny = np.float32(np.finfo(np.float32).tiny)
    flushed = np.where(
        np.abs(EDGES) < tiny, np.float32(0), EDGES
    )  # XLA's CPU treats subnormal numbers as zeros
    expected = np.where(flushed > 0, 1.0, np.where(flushed < 0, -1.0, zero))
    expected = np.where(np.isnan(EDGES), np.nan, expected)
    np.testing.assert_array_equal(ste.sign(jnp.asarray(EDGES), zero=zero), expected)
    np.testing.assert_array_equal(jax.jit(ste.sign, static_argnames="zero")(EDGES, zero=zero), expected)


def test_heaviside_forward() -> None:
    tiny = np.finfo(np.float32).tiny
    expected = np.where(np.isnan(EDGES), np.nan, np.where(tiny > EDGES, 0.0, 1.0))
    np.testing.assert_array_equal(ste.heaviside(jnp.asarray(EDGES)), expected)


@pytest.mark.parametrize(
    ("step", "progress"), [(ste.sign, 0.0), (ste.heaviside, 0.3), (ste.sign, 0.75), (ste.sign, 1.0)]
)
@pytest.mark.parametrize("name", ste.STES)
def test_backward_is_g_times_h(step, name: str, progress: float) -> None:
    g = np.linspace(-2, 3, EDGES.size, dtype=np.float32)
    got = backward(lambda z: step(z, name, progress), EDGES, g)
    number = ~np.isnan(EDGES)
    expected = g * expected_slope(name, EDGES, progress)
    # 1 - tanh^2 and the power lose some float32 precision: 2e-6 of the largest slope, 10.
    np.testing.assert_allclose(got[number], expected[number], rtol=1e-5, atol=2e-5)
    if name in ("identity", "clipped"):
        np.testing.assert_array_equal(got[number], expected[number].astype(np.float32))


@pytest.mark.parametrize("name", ste.STES)
def test_progress_may_be_traced_and_has_no_gradient(name: str) -> None:
    z = jnp.linspace(-2, 2, 9)
    slope = jax.jit(lambda p: jax.grad(lambda z: ste.sign(z, name, p).sum())(z))(jnp.float32(0.4))
    np.testing.assert_allclose(slope, expected_slope(name, np.asarray(z), 0.4), rtol=1e-5, atol=2e-5)
    assert jax.grad(lambda p: ste.sign(z, name, p).sum())(0.4) == 0


def smooth_swish(x: np.ndarray) -> np.ndarray:
    sigmoid = 1 / (1 + np.exp(-5 * x))
    return 2 * sigmoid * (1 + 5 * x * (1 - sigmoid)) - 1


def smooth_approx(x: np.ndarray) -> np.ndarray:
    inside = np.where(x < 0, 2 * x + x**2, 2 * x - x**2)
    return np.where(np.abs(x) < 1, inside, np.sign(x))


SMOOTH = {
    "clipped": (lambda x: np.clip(x, -1, 1), 0.0),
    "approx_sign": (smooth_approx, 0.0),
    "swish_sign": (smooth_swish, 0.0),
    "tanh": (lambda x: np.tanh(10 * x), 1.0),  # k = 1, t = 10 at the end of training
    "reste": (lambda x: np.sign(x) * np.abs(x) ** (1 / 3), 1.0),  # order 3 at the end
}


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_are_derivatives_of_the_smooth_surrogates(name: str) -> None:
    smooth, progress = SMOOTH[name]
    x = np.array([-1.3, -0.9, -0.6, -0.3, -0.15, 0.12, 0.4, 0.7, 0.95, 1.2])
    numerical = (smooth(x + 1e-5) - smooth(x - 1e-5)) / 2e-5
    got = ste.surrogate(name, jnp.asarray(x, jnp.float32), progress)
    # Central differences are accurate to 1e-9 here; float32 slopes up to 5 to 1e-5.
    np.testing.assert_allclose(got, numerical, atol=1e-5)


@pytest.mark.parametrize("name", ["clipped", "approx_sign", "swish_sign"])
def test_slopes_integrate_to_the_jump_of_sign(name: str) -> None:
    z, width = np.linspace(-20, 20, 400_001, retstep=True)
    total = np.asarray(ste.surrogate(name, jnp.asarray(z, jnp.float32))).astype(np.float64).sum() * width
    # Riemann sum with step 1e-4: the two jumps of the window cost up to one step each.
    np.testing.assert_allclose(total, 2, atol=2e-4)


def test_swish_sign_shape() -> None:
    slope = lambda z: float(ste.swish_sign(jnp.float32(z)))  # noqa: E731
    assert slope(0) == 5
    assert slope(0.47) > 0
    assert slope(0.49) < 0
    assert slope(0.69) == pytest.approx(-0.37, abs=0.005)  # the minimum, to the digits it is quoted with


def test_annealed_tanh_starts_as_identity_and_ends_as_a_narrow_peak() -> None:
    inside = jnp.linspace(-1, 1, 21)
    # tanh(0.001)^2 is 1e-6, and 1 - 1e-6 is off by half a float32 ulp.
    np.testing.assert_allclose(ste.tanh(inside, 0.0), 1, atol=1.1e-6)
    at_zero = [float(ste.tanh(jnp.float32(0), progress)) for progress in (0.0, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(at_zero, [1, 1, 1, 10], rtol=1e-6)
    assert float(ste.tanh(jnp.float32(0.2), 1.0)) < 1 < float(ste.tanh(jnp.float32(0.1), 1.0))


def test_reste_starts_as_a_window() -> None:
    z = jnp.asarray([-1.6, -1.5, -1, -0.05, 0, 0.05, 0.1, 0.7, 1.5, 1.51], jnp.float32)
    np.testing.assert_allclose(
        ste.reste(z, 0.0), (np.abs(np.asarray(z)) <= 1.5).astype(np.float32), rtol=1e-6
    )


def test_round_to_grid_forward_and_backward() -> None:
    z = np.array(
        [-8.6, -8.5, -8, -1.5, -0.5, -0.0, 0, 0.5, 1.5, 2.5, 7, 7.2, np.inf, -np.inf, np.nan], np.float32
    )
    expected = np.array([-8, -8, -8, -2, 0, 0, 0, 0, 2, 2, 7, 7, 7, -8, np.nan])  # half to even
    np.testing.assert_array_equal(ste.round_to_grid(jnp.asarray(z), -8, 7), expected)
    g = np.arange(1, z.size + 1, dtype=np.float32)
    np.testing.assert_array_equal(backward(lambda z: ste.round_to_grid(z, -8, 7), z, g), g)
    window = (z >= -8) & (z <= 7)
    np.testing.assert_array_equal(
        backward(lambda z: ste.round_to_grid(z, -8, 7, "clipped"), z, g), g * window
    )


def test_stochastic_sign_has_the_mean_of_its_probability() -> None:
    z = jnp.asarray([-2, -1, -0.5, 0, 0.25, 0.9, 1, 3], jnp.float32)
    samples = 20_000
    draws = ste.stochastic_sign(jnp.broadcast_to(z, (samples, z.size)), jax.random.key(0))
    assert set(np.unique(draws)) == {-1, 1}
    mean = np.clip(np.asarray(z), -1, 1)
    deviation = np.sqrt(1 - mean**2) / np.sqrt(samples)
    assert np.all(
        np.abs(draws.mean(0) - mean) <= 5 * deviation
    )  # five standard deviations; exact at the ends
    assert np.isnan(ste.stochastic_sign(jnp.float32(np.nan)[None], jax.random.key(1))).all()


@pytest.mark.parametrize("name", ["identity", "clipped"])
def test_stochastic_sign_backward(name: str) -> None:
    finite = EDGES[np.isfinite(EDGES)]
    g = np.linspace(-1, 2, finite.size, dtype=np.float32)
    got = backward(lambda z: ste.stochastic_sign(z, jax.random.key(0), name), finite, g)
    np.testing.assert_array_equal(got, g * expected_slope(name, finite, 1.0).astype(np.float32))


def test_straight_through_sums_over_broadcast_inputs_and_ignores_value_and_slopes() -> None:
    value = jnp.arange(6.0).reshape(2, 3)
    row, whole = jnp.ones((2, 1)), jnp.ones((2, 3))
    slopes = (jnp.full((2, 3), 2.0), jnp.full((2, 3), 0.5))
    g = jnp.asarray([[1.0, 2, 3], [4, 5, 6]])
    apply = lambda value, row, whole, slope: ste.straight_through(value, (row, whole), (slope, slopes[1]))  # noqa: E731
    out, pull = jax.vjp(apply, value, row, whole, slopes[0])
    np.testing.assert_array_equal(out, value)
    to_value, to_row, to_whole, to_slope = pull(g)
    np.testing.assert_array_equal(to_row, [[12], [30]])
    np.testing.assert_array_equal(to_whole, g / 2)
    assert not to_value.any()
    assert not to_slope.any()
    forward = jax.jvp(lambda row: apply(value, row, whole, slopes[0]), (row,), (jnp.asarray([[1.0], [10]]),))[
        1
    ]
    np.testing.assert_array_equal(forward, [[2, 2, 2], [20, 20, 20]])


@pytest.mark.parametrize("name", ste.STES)
def test_vmap_and_jit_do_not_change_results(name: str) -> None:
    z = jnp.asarray(EDGES[:24]).reshape(4, 6)
    slope = jax.grad(lambda z: ste.sign(z, name, 0.6).sum())
    one_by_one = jnp.stack([slope(row) for row in z])
    # Under jit the surrogate's products may be fused: one ulp of a slope up to 10.
    np.testing.assert_allclose(jax.jit(jax.vmap(slope))(z), one_by_one, rtol=3e-7, atol=1e-6)


def test_bfloat16_stays_bfloat16() -> None:
    z = jnp.asarray([-2, 0, 0.5, 1], jnp.bfloat16)
    for name in ste.STES:
        value, pull = jax.vjp(lambda z: ste.sign(z, name), z)  # noqa: B023
        assert value.dtype == pull(value)[0].dtype == jnp.bfloat16


def test_unknown_names_are_rejected() -> None:
    z = jnp.zeros(3)
    with pytest.raises(
        ValueError, match="STE: got 'aprox_sign', expected one of .*did you mean 'approx_sign'"
    ):
        ste.sign(z, "aprox_sign")
    with pytest.raises(ValueError, match="rounding step: got 'tanh', expected 'identity' or 'clipped'"):
        ste.round_to_grid(z, -1, 1, "tanh")
