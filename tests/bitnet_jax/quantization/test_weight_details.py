"""Weight quantizers: published vectors and errors, and the options on which papers disagree."""

from __future__ import annotations

import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization import binary_weights, multilevel_weights
from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.multilevel_weights import integer
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS

RANDOM = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)


def gaussian() -> np.ndarray:
    """65,536 quantiles of N(0, 1): the distribution without sampling error."""
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    return np.random.default_rng(1).permutation(np.asarray(quantiles, np.float32)).reshape(256, 256)


def pull(quantize, w, g, args: Arguments = DEFAULT):
    """d(codes * scale)/dw, applied to g."""
    back = jax.vjp(lambda w: quantize(w, args).dequantize(), jnp.asarray(w))[1]
    return np.asarray(back(jnp.asarray(g))[0])


def test_a_larger_scale_gives_more_zeros() -> None:
    w = jnp.asarray(gaussian())
    zeros = []
    for factor in (0.5, 1.0, 1.5, 2.0):
        q = multilevel_weights.ternary_absmean(w, factor=factor)
        size = factor * float(jnp.mean(jnp.abs(w)))
        np.testing.assert_allclose(q.scale, [[size]], rtol=1e-6)
        np.testing.assert_array_equal(q.codes, np.clip(np.round(np.asarray(w) / size), -1, 1))
        zeros.append(float(jnp.mean(q.codes == 0)))
    assert zeros == sorted(zeros)
    assert zeros[1] == pytest.approx(0.310, abs=0.001)


def test_ties_and_signed_zeros() -> None:
    # mean |W| is exactly 1, so 0.5 and -0.5 are ties: half to even is 0.
    w = jnp.asarray([[0.5, -0.5, 0.0, -0.0, 2.0, -2.0, 1.5, -1.5]], jnp.float32)
    np.testing.assert_array_equal(multilevel_weights.ternary_absmean(w).codes, [[0, 0, 0, 0, 1, -1, 1, -1]])
    np.testing.assert_array_equal(binary_weights.binary(w).codes, [[1, -1, 1, 1, 1, -1, 1, -1]])
    np.testing.assert_array_equal(binary_weights.binary(w, zero=-1).codes, [[1, -1, -1, -1, 1, -1, 1, -1]])
    np.testing.assert_array_equal(binary_weights.binary_centred(w).codes, [[1, -1, -1, -1, 1, -1, 1, -1]])
    np.testing.assert_array_equal(
        binary_weights.binary_centred(w, zero=1).codes, [[1, -1, 1, 1, 1, -1, 1, -1]]
    )


# --- published numbers


def test_published_vectors() -> None:
    w = jnp.asarray([[0.8, -0.5, 1.2], [-1.5, 0.4, -0.9], [1.3, -0.7, 0.2]], jnp.float32)
    ternary = multilevel_weights.ternary_absmean(w)
    np.testing.assert_array_equal(ternary.codes, [[1, -1, 1], [-1, 0, -1], [1, -1, 0]])
    np.testing.assert_allclose(ternary.scale, [[7.5 / 9]], rtol=1e-6)
    binary = binary_weights.binary_centred(w)
    np.testing.assert_array_equal(binary.codes, [[1, -1, 1], [-1, 1, -1], [1, -1, 1]])
    np.testing.assert_allclose(binary.scale, [[7.5 / 9]], rtol=1e-6)


ERRORS = {
    "sign, analytic scale": (binary_weights.binary, None, 0.3634),
    "sign, no scale": (binary_weights.binary_raw, None, 0.4042),
    "ternary absmean": (multilevel_weights.ternary_absmean, None, 0.2634),
    "twn": (multilevel_weights.ternary_twn, None, 0.1916),
    "2-bit mid-rise": (partial(integer, bits=2, levels="midrise"), 0.997 / 2, 0.1188),
    "2-bit mid-rise, measured": (
        partial(integer, bits=2, levels="midrise", statistic="absmean"),
        None,
        0.1188,
    ),
    "2-bit with zero": (partial(integer, bits=2), 1.045, 0.1494),
    "3-bit mid-rise": (partial(integer, bits=3, levels="midrise"), 0.587 / 2, 0.0374),
    "3-bit with zero": (partial(integer, bits=3), 0.606, 0.0406),
    "3-bit with zero, measured": (partial(integer, bits=3, statistic="absmean"), None, 0.0406),
    "4-bit mid-rise": (partial(integer, bits=4, levels="midrise"), 0.335 / 2, 0.0115),
    "4-bit with zero": (partial(integer, bits=4), 0.340, 0.0119),
    "lsq start, 2 bit": (partial(integer, bits=2), 2 * 0.797885, 0.221),
    "lsq start, 3 bit": (partial(integer, bits=3), 2 * 0.797885 / 3**0.5, 0.071),
    "lsq start, 4 bit": (partial(integer, bits=4), 2 * 0.797885 / 7**0.5, 0.030),
    "lsq start, 8 bit": (partial(integer, bits=8), 2 * 0.797885 / 127**0.5, 0.0017),
}


@pytest.mark.parametrize("case", ERRORS)
def test_relative_error_on_a_gaussian(case: str) -> None:
    quantize, scale, target = ERRORS[case]
    w = gaussian()
    args = Arguments(scale=None if scale is None else jnp.full((1, 1), scale, jnp.float32))
    error = np.mean((np.asarray(quantize(jnp.asarray(w), args).dequantize()) - w) ** 2) / np.mean(w**2)
    # Half a unit in the last published digit, plus 0.2 % for the tail beyond the last quantile.
    digit = 0.5 * 10.0 ** -len(str(target).split(".")[1])
    assert abs(error - target) < digit + 0.002 * target


def test_twn_scale_and_zeros_on_a_gaussian() -> None:
    q = multilevel_weights.ternary_twn(jnp.asarray(gaussian()))
    assert float(q.scale.item()) == pytest.approx(1.184, abs=0.0006)  # the published digits
    assert float(jnp.mean(q.codes == 0)) == pytest.approx(0.424, abs=0.0006)


@pytest.mark.parametrize(
    ("draw", "quantize", "zeros"),
    [
        ("standard_normal", multilevel_weights.ternary_absmean, 0.310),
        ("laplace", multilevel_weights.ternary_absmean, 0.393),
        ("uniform", multilevel_weights.ternary_absmean, 0.25),
        ("standard_normal", multilevel_weights.ternary_absmedian, 0.264),
    ],
)
def test_zero_fractions(draw: str, quantize, zeros: float) -> None:
    rng = np.random.default_rng(3)
    w = {
        "standard_normal": rng.standard_normal,
        "laplace": lambda size: rng.laplace(size=size),
        "uniform": lambda size: rng.uniform(-1, 1, size),
    }[draw]((512, 512))
    codes = quantize(jnp.asarray(w, jnp.float32)).codes
    # Published to three digits; five standard errors of a fraction of 262,144 are 0.005.
    assert float(jnp.mean(codes == 0)) == pytest.approx(zeros, abs=0.0055)


def test_mean_absolute_value_is_the_optimal_binary_scale() -> None:
    w = RANDOM.astype(np.float64)
    q = binary_weights.binary(jnp.asarray(w, jnp.float32))
    residual = lambda scale: np.sum((w - scale * np.asarray(q.codes)) ** 2)  # noqa: E731
    best = np.sum(w**2) - np.sum(np.abs(w)) ** 2 / w.size
    scale = float(q.scale.item())
    np.testing.assert_allclose(residual(scale), best, rtol=1e-9)
    assert residual(scale * 1.01) > best < residual(scale * 0.99)


def test_stretched_elastic_levels() -> None:
    w, alpha = jnp.linspace(-1, 1, 41).reshape(1, 41), jnp.ones((1, 1))
    ternary = WEIGHT_QUANTIZERS["seq_ternary"](w, Arguments(scale=alpha)).dequantize()
    np.testing.assert_allclose(np.unique(ternary), [-2 / 3, 0, 2 / 3], rtol=1e-6)
    four = WEIGHT_QUANTIZERS["seq_int2"](w, Arguments(scale=alpha)).dequantize()
    np.testing.assert_array_equal(np.unique(four), [-0.75, -0.25, 0.25, 0.75])


# --- details on which papers disagree


@pytest.mark.parametrize(
    ("epsilon", "scale", "codes"),
    [("clamp", 1.0, [1, 0, -1, 1]), ("add", 1.5, [1, 0, -1, 1]), ("divisor", 1.0, [1, 0, -1, 1])],
)
def test_epsilon_of_the_ternary_scale(epsilon: str, scale: float, codes: list) -> None:
    w = jnp.asarray([[1.0, 0.25, -1.75, 1.0]])  # mean |W| = 1
    q = multilevel_weights.ternary_absmean(w, epsilon=epsilon, eps=0.5)
    assert q.scale.item() == pytest.approx(scale)
    np.testing.assert_array_equal(q.codes, [codes])
    # 0.6 is above half of 1 and below half of 1.5: epsilon decides its code.
    near = multilevel_weights.ternary_absmean(jnp.asarray([[0.6, 1.4]]), epsilon=epsilon, eps=0.5)
    assert near.codes[0, 0] == (1 if epsilon == "clamp" else 0)


def test_gradients_through_centring_and_scale() -> None:
    g = np.random.default_rng(8).standard_normal(RANDOM.shape).astype(np.float32)
    stopped = pull(binary_weights.binary_centred, RANDOM, g)
    centred = pull(partial(binary_weights.binary_centred, centre_gradient=True), RANDOM, g)
    np.testing.assert_allclose(centred, stopped - stopped.mean(), atol=1e-6)
    scaled = pull(partial(binary_weights.binary, scale_gradient=True), RANDOM, g)
    sign = np.sign(RANDOM)
    np.testing.assert_allclose(scaled, g + (g * sign).sum() * sign / RANDOM.size, atol=1e-6)


def test_the_magnitude_aware_window_applies_to_the_raw_latents() -> None:
    got = pull(
        partial(binary_weights.binary, window="raw"), RANDOM, np.ones_like(RANDOM), Arguments(ste="clipped")
    )
    np.testing.assert_allclose(got, np.abs(RANDOM).mean() * (np.abs(RANDOM) <= 1), rtol=1e-6)


def test_stochastic_is_deterministic_without_a_key() -> None:
    w = jnp.asarray(np.clip(RANDOM, -0.9, 0.9))
    first = binary_weights.binary_stochastic(w, Arguments(key=jax.random.key(0))).codes
    assert (first != binary_weights.binary_stochastic(w, Arguments(key=jax.random.key(1))).codes).any()
    np.testing.assert_array_equal(
        first, binary_weights.binary_stochastic(w, Arguments(key=jax.random.key(0))).codes
    )
    np.testing.assert_array_equal(
        binary_weights.binary_stochastic(w).codes, binary_weights.binary_raw(w).codes
    )
    assert (first != binary_weights.binary_raw(w).codes).any()


@pytest.mark.parametrize(
    ("call", "args", "message"),
    [
        (
            partial(binary_weights.binary, window="wide"),
            DEFAULT,
            "window: got 'wide', expected 'scaled' or 'raw'",
        ),
        (partial(integer, bits=4, levels="odd"), DEFAULT, "levels: got 'odd', expected 'zero' or 'midrise'"),
        (partial(integer, bits=8, statistic="absmean"), DEFAULT, "statistic: got 'absmean' for 8 bits"),
        (
            partial(integer, bits=4, count="all"),
            Arguments(scale=jnp.ones((1, 1), jnp.float32)),
            "count: got 'all'",
        ),
        (partial(multilevel_weights.stretched_elastic, levels=5), DEFAULT, "levels: got 5, expected 3 or 4"),
        (
            multilevel_weights.ternary_absmean,
            Arguments(granularity=7),
            "granularity: got 7 for weights with 16 inputs",
        ),
        (multilevel_weights.ternary_absmean, Arguments(ste="tanh"), "rounding step: got 'tanh'"),
        (partial(multilevel_weights.ternary_absmean, epsilon="in"), DEFAULT, "epsilon: got 'in'"),
    ],
)
def test_invalid_options_are_rejected(call, args: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(jnp.asarray(RANDOM), args)
