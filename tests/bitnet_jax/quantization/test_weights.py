"""Weight quantizers: both formulas, edge values, published vectors and errors, disputed options."""

from __future__ import annotations

import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization import weights as quantizers
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS
from bitnet_jax.quantization.weights import integer

BINARY = ("binary", "binary_centred", "binary_raw", "binary_stochastic", "bwn")
TERNARY = ("ternary_absmean", "ternary_absmedian", "ternary_twn", "seq_ternary")
LEVELS = {name: {-1, 1} for name in BINARY} | {name: {-1, 0, 1} for name in TERNARY}
LEVELS["zero_one"] = {0, 1}
LEVELS |= {"int2": {-3, -1, 1, 3}, "seq_int2": {-3, -1, 1, 3}}
LEVELS |= {f"int{bits}": set(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) for bits in (3, 4, 8)}
WINDOWED = ("binary_raw", "binary_stochastic", "bwn")  # their window is on the raw latents

RANDOM = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)


def gaussian() -> np.ndarray:
    """65,536 quantiles of N(0, 1): the distribution itself, with no sampling error."""
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    return np.random.default_rng(1).permutation(np.asarray(quantiles, np.float32)).reshape(256, 256)


def pull(quantize, w, g):
    """d(codes * scale)/dw, applied to g."""
    return np.asarray(jax.vjp(lambda w: quantize(w).dequantize(), jnp.asarray(w))[1](jnp.asarray(g))[0])


def over(w: np.ndarray, granularity, reduce) -> np.ndarray:
    """A statistic of the weights that share a scale, spread over them, in float64."""
    w = w.astype(np.float64)
    groups = {"tensor": w.reshape(1, -1), "channel": w}.get(granularity)
    if groups is None:
        groups = w.reshape(-1, granularity)
    return np.repeat(reduce(groups, axis=1), groups.shape[1]).reshape(w.shape)


def half_open_odd(z: np.ndarray) -> np.ndarray:
    return np.clip(2 * np.floor(z / 2) + 1, -3, 3)


def expected(name: str, w: np.ndarray, granularity) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale spread over the weights) from the formulas, in float64."""
    w = w.astype(np.float64)
    size = over(np.abs(w), granularity, np.mean)
    sign = np.where(w >= 0, 1, -1)
    match name:
        case "binary" | "bwn":
            return sign, size
        case "zero_one":
            return np.where(w > 0, 1, 0), size
        case "binary_centred":
            return np.where(w - over(w, granularity, np.mean) > 0, 1, -1), size
        case "binary_raw" | "binary_stochastic":
            return sign, np.ones_like(w)
        case "ternary_absmean":
            return np.clip(np.round(w / size), -1, 1), size
        case "ternary_absmedian":
            size = over(np.abs(w), granularity, np.median)
            return np.clip(np.round(w / size), -1, 1), size
        case "ternary_twn":
            keep = np.abs(w) > 0.7 * size
            alpha = over(np.abs(w) * keep, granularity, np.sum) / over(keep, granularity, np.sum)
            return sign * keep, alpha
        case "seq_ternary":
            alpha = over(np.abs(w), granularity, np.max)
            return np.round(1.5 * np.clip(w / alpha, -0.99, 0.99)), alpha / 1.5
        case "seq_int2":
            alpha = over(np.abs(w), granularity, np.max)
            return 2 * (np.round(2 * np.clip(w / alpha, -0.99, 0.99) - 0.5) + 0.5), alpha / 4
        case "int2":
            step = 0.997 * np.sqrt(np.pi / 2) * size
            return half_open_odd(w / step * 2), step / 2
        case "int3" | "int4" | "int8":
            high = 2 ** (int(name[3]) - 1) - 1
            scale = over(np.abs(w), granularity, np.max) / high
            return np.clip(np.round(w / scale), -high - 1, high), scale
    raise AssertionError(name)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_forward_formula(name: str, granularity) -> None:
    codes, scale = expected(name, RANDOM, granularity)
    got = WEIGHT_QUANTIZERS[name](jnp.asarray(RANDOM), granularity=granularity)
    np.testing.assert_array_equal(got.codes, codes)
    # A mean over 96 float32 values, a handful of products: a few ulp.
    np.testing.assert_allclose(got.dequantize(), codes * scale, rtol=1e-6)
    assert set(np.unique(got.codes)) <= LEVELS[name]
    unscaled = name in ("binary_raw", "binary_stochastic")
    shape = {"tensor": (1, 1), "channel": (6, 1), 4: (6, 4)}[granularity]
    assert got.scale.shape == ((1, 1) if unscaled else shape)


@pytest.mark.parametrize("ste", ["identity", "clipped"])
@pytest.mark.parametrize("granularity", ["tensor", 4])
@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_backward_formula(name: str, granularity, ste: str) -> None:
    g = np.random.default_rng(2).standard_normal(RANDOM.shape).astype(np.float32)
    _, scale = expected(name, RANDOM, granularity)
    w = RANDOM.astype(np.float64)
    z = w / scale
    if name == "binary_centred":
        z = (w - over(w, granularity, np.mean)) / scale
    low, high = {"seq_ternary": (-1.485, 1.485), "seq_int2": (-3.96, 3.96), "int2": (-4, 4)}.get(
        name, (-1, 1)
    )
    if name in ("int3", "int4", "int8"):
        high = 2 ** (int(name[3]) - 1) - 1 + 1e-5  # the largest weight is an end point, up to rounding
        low = -high - 1
    window = (z >= low) & (z <= high) if ste == "clipped" else np.ones_like(z)
    if name in WINDOWED:
        window = scale * (np.abs(w) <= 1) if ste == "clipped" else scale * np.ones_like(z)
    if name == "bwn":
        window = window + 1 / {"tensor": 96, 4: 4}[granularity]
    got = pull(partial(WEIGHT_QUANTIZERS[name], granularity=granularity, ste=ste), RANDOM, g)
    # scale * (1 / scale) and the like: a few float32 ulp.
    np.testing.assert_allclose(got, g * window, rtol=2e-6)


@pytest.mark.parametrize("ste", ["approx_sign", "swish_sign", "tanh", "reste"])
@pytest.mark.parametrize("name", BINARY)
def test_binary_quantizers_take_every_ste(name: str, ste: str) -> None:
    from bitnet_jax.quantization.ste import surrogate

    got = pull(partial(WEIGHT_QUANTIZERS[name], ste=ste, progress=0.8), RANDOM, np.ones_like(RANDOM))
    q = WEIGHT_QUANTIZERS[name](jnp.asarray(RANDOM))
    inner = RANDOM - RANDOM.mean() if name == "binary_centred" else RANDOM
    raw = name in WINDOWED
    z = inner if raw else inner / np.asarray(q.scale)
    slope = np.asarray(surrogate(ste, jnp.asarray(z), 0.8)) * (np.asarray(q.scale) if raw else 1)
    slope = slope + (1 / 16 if name == "bwn" else 0)
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-5)  # steep slopes amplify the rounding of z


# --- edge values


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("value", [0.0, -0.0, -1e-40, 0.25])
def test_constant_matrices(name: str, value: float) -> None:
    """No division by zero anywhere; zeros and subnormals quantize to something of the order of the floor."""
    w = np.full(RANDOM.shape, value, np.float32)  # one shape for all: compiled once
    q = WEIGHT_QUANTIZERS[name](jnp.asarray(w), granularity="channel")
    codes, scale = np.asarray(q.codes), np.asarray(q.scale)
    assert set(np.unique(codes)) <= LEVELS[name]
    assert len(np.unique(codes)) == 1
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    grad = pull(partial(WEIGHT_QUANTIZERS[name], granularity="channel"), w, np.ones_like(w))
    assert np.isfinite(grad).all()
    if value and abs(value) < 1 and abs(value) > 1e-30 and name not in ("seq_ternary", "seq_int2", "int2"):
        expected_value = (
            -1 if name == "binary_centred" else 1
        )  # all weights equal their mean: sign(0) is -1 there
        size = 1 if name in ("binary_raw", "binary_stochastic") else abs(value)
        np.testing.assert_allclose(codes * scale, expected_value * size * np.ones_like(w), rtol=1e-6)
    if abs(value) < 1e-30:
        unscaled = name in ("binary_raw", "binary_stochastic")
        assert np.abs(codes * scale).max() <= (1 if unscaled else 1.1e-5)
        if name in TERNARY + ("int3", "int4", "int8"):
            assert not codes.any()


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_nan_is_never_hidden(name: str) -> None:
    w = RANDOM.copy()
    w[2, 5] = np.nan
    value = np.asarray(WEIGHT_QUANTIZERS[name](jnp.asarray(w), granularity="channel").dequantize())
    assert np.isnan(value[2, 5])
    if name not in ("binary_raw", "binary_stochastic"):  # a measured scale is shared
        assert np.isnan(value[2]).all()
    assert np.isfinite(np.delete(value, 2, axis=0)).all()


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinity_stays_in_its_row(name: str, infinity: float) -> None:
    w = RANDOM.copy()
    w[2, 5] = infinity
    value = np.asarray(WEIGHT_QUANTIZERS[name](jnp.asarray(w), granularity="channel").dequantize())
    assert np.isfinite(np.delete(value, 2, axis=0)).all()
    if name in ("binary_raw", "binary_stochastic", "ternary_absmedian"):  # their scale does not see it
        assert value[2, 5] == np.sign(infinity) * np.abs(value[2]).max()
    else:
        assert not np.isfinite(value[2]).any()
    learned = WEIGHT_QUANTIZERS[name](jnp.asarray(w), granularity="channel", scale=jnp.full((6, 1), 0.7))
    if name != "binary_centred" and name != "ternary_twn":  # these two still measure a mean
        assert np.isfinite(learned.dequantize()).all()
        assert abs(learned.codes[2, 5]) == max(
            (abs(code) for code in LEVELS[name] if code * infinity > 0), default=0
        )


def test_a_larger_scale_has_more_zeros() -> None:
    w = jnp.asarray(gaussian())
    zeros = []
    for factor in (0.5, 1.0, 1.5, 2.0):
        q = quantizers.ternary_absmean(w, factor=factor)
        size = factor * float(jnp.mean(jnp.abs(w)))
        np.testing.assert_allclose(q.scale, [[size]], rtol=1e-6)
        np.testing.assert_array_equal(q.codes, np.clip(np.round(np.asarray(w) / size), -1, 1))
        zeros.append(float(jnp.mean(q.codes == 0)))
    assert zeros == sorted(zeros)
    assert zeros[1] == pytest.approx(0.310, abs=0.001)


def test_ties_and_signed_zeros() -> None:
    # mean |W| is exactly 1, so 0.5 and -0.5 are ties: half to even is 0.
    w = jnp.asarray([[0.5, -0.5, 0.0, -0.0, 2.0, -2.0, 1.5, -1.5]], jnp.float32)
    np.testing.assert_array_equal(quantizers.ternary_absmean(w).codes, [[0, 0, 0, 0, 1, -1, 1, -1]])
    np.testing.assert_array_equal(quantizers.binary(w).codes, [[1, -1, 1, 1, 1, -1, 1, -1]])
    np.testing.assert_array_equal(quantizers.binary(w, zero=-1).codes, [[1, -1, -1, -1, 1, -1, 1, -1]])
    np.testing.assert_array_equal(quantizers.binary_centred(w).codes, [[1, -1, -1, -1, 1, -1, 1, -1]])
    np.testing.assert_array_equal(quantizers.binary_centred(w, zero=1).codes, [[1, -1, 1, 1, 1, -1, 1, -1]])


# --- published numbers


def test_vectors_of_the_papers_dossier() -> None:
    w = jnp.asarray([[0.8, -0.5, 1.2], [-1.5, 0.4, -0.9], [1.3, -0.7, 0.2]], jnp.float32)
    ternary = quantizers.ternary_absmean(w)
    np.testing.assert_array_equal(ternary.codes, [[1, -1, 1], [-1, 0, -1], [1, -1, 0]])
    np.testing.assert_allclose(ternary.scale, [[7.5 / 9]], rtol=1e-6)
    binary = quantizers.binary_centred(w)
    np.testing.assert_array_equal(binary.codes, [[1, -1, 1], [-1, 1, -1], [1, -1, 1]])
    np.testing.assert_allclose(binary.scale, [[7.5 / 9]], rtol=1e-6)


ERRORS = {
    "sign, analytic scale": (quantizers.binary, 0.3634),
    "sign, no scale": (quantizers.binary_raw, 0.4042),
    "ternary absmean": (quantizers.ternary_absmean, 0.2634),
    "twn": (quantizers.ternary_twn, 0.1916),
    "2-bit mid-rise": (partial(integer, bits=2, levels="midrise", scale=0.997 / 2), 0.1188),
    "2-bit mid-rise, measured": (partial(integer, bits=2, levels="midrise", statistic="absmean"), 0.1188),
    "2-bit with zero": (partial(integer, bits=2, scale=1.045), 0.1494),
    "3-bit mid-rise": (partial(integer, bits=3, levels="midrise", scale=0.587 / 2), 0.0374),
    "3-bit with zero": (partial(integer, bits=3, scale=0.606), 0.0406),
    "3-bit with zero, measured": (partial(integer, bits=3, statistic="absmean"), 0.0406),
    "4-bit mid-rise": (partial(integer, bits=4, levels="midrise", scale=0.335 / 2), 0.0115),
    "4-bit with zero": (partial(integer, bits=4, scale=0.340), 0.0119),
    "lsq start, 2 bit": (partial(integer, bits=2, scale=2 * 0.797885), 0.221),
    "lsq start, 3 bit": (partial(integer, bits=3, scale=2 * 0.797885 / 3**0.5), 0.071),
    "lsq start, 4 bit": (partial(integer, bits=4, scale=2 * 0.797885 / 7**0.5), 0.030),
    "lsq start, 8 bit": (partial(integer, bits=8, scale=2 * 0.797885 / 127**0.5), 0.0017),
}


@pytest.mark.parametrize("case", ERRORS)
def test_relative_error_on_a_gaussian(case: str) -> None:
    quantize, target = ERRORS[case]
    w = gaussian()
    if isinstance(quantize, partial) and "scale" in quantize.keywords:
        quantize = partial(quantize, scale=jnp.full((1, 1), quantize.keywords["scale"], jnp.float32))
    error = np.mean((np.asarray(quantize(jnp.asarray(w)).dequantize()) - w) ** 2) / np.mean(w**2)
    # Half a unit of the last digit quoted, and 0.2 % for the tail beyond the last quantile.
    digit = 0.5 * 10.0 ** -len(str(target).split(".")[1])
    assert abs(error - target) < digit + 0.002 * target


def test_twn_scale_and_zeros_on_a_gaussian() -> None:
    q = quantizers.ternary_twn(jnp.asarray(gaussian()))
    assert float(q.scale.item()) == pytest.approx(1.184, abs=0.0006)  # the digits quoted
    assert float(jnp.mean(q.codes == 0)) == pytest.approx(0.424, abs=0.0006)


@pytest.mark.parametrize(
    ("draw", "quantize", "zeros"),
    [
        ("standard_normal", quantizers.ternary_absmean, 0.310),
        ("laplace", quantizers.ternary_absmean, 0.393),
        ("uniform", quantizers.ternary_absmean, 0.25),
        ("standard_normal", quantizers.ternary_absmedian, 0.264),
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
    # Quoted to three digits; five standard errors of a fraction of 262,144 are 0.005.
    assert float(jnp.mean(codes == 0)) == pytest.approx(zeros, abs=0.0055)


def test_mean_absolute_value_is_the_optimal_binary_scale() -> None:
    w = RANDOM.astype(np.float64)
    q = quantizers.binary(jnp.asarray(w, jnp.float32))
    residual = lambda scale: np.sum((w - scale * np.asarray(q.codes)) ** 2)  # noqa: E731
    best = np.sum(w**2) - np.sum(np.abs(w)) ** 2 / w.size
    scale = float(q.scale.item())
    np.testing.assert_allclose(residual(scale), best, rtol=1e-9)
    assert residual(scale * 1.01) > best < residual(scale * 0.99)


def test_stretched_elastic_levels() -> None:
    w, alpha = jnp.linspace(-1, 1, 41).reshape(1, 41), jnp.ones((1, 1))
    ternary = WEIGHT_QUANTIZERS["seq_ternary"](w, scale=alpha).dequantize()
    np.testing.assert_allclose(np.unique(ternary), [-2 / 3, 0, 2 / 3], rtol=1e-6)
    four = WEIGHT_QUANTIZERS["seq_int2"](w, scale=alpha).dequantize()
    np.testing.assert_array_equal(np.unique(four), [-0.75, -0.25, 0.25, 0.75])


# --- learned scales


def learned_gradients(quantize, w, scale, g):
    return [
        np.asarray(a)
        for a in jax.vjp(lambda w, s: quantize(w, scale=s).dequantize(), jnp.asarray(w), scale)[1](
            jnp.asarray(g)
        )
    ]


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (6, 4)])
@pytest.mark.parametrize("count", ["shared", "matrix"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_lsq_gradients(bits: int, shape: tuple, count: str) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    g = np.random.default_rng(4).standard_normal(RANDOM.shape).astype(np.float32)
    scale = np.random.default_rng(5).uniform(1.2, 1.8, shape).astype(np.float32) / high
    spread = np.broadcast_to(np.repeat(scale, 16 // shape[1] if shape[1] > 1 else 1, axis=1), RANDOM.shape)
    z = RANDOM.astype(np.float64) / spread
    inside = (z > low) & (z < high)
    assert 0 < inside.sum() < inside.size  # both branches are in the sample
    per_weight = g * np.where(inside, np.round(z) - z, np.where(z < 0, low, high))
    per_scale = per_weight.reshape(shape[0] if shape[0] > 1 else 1, -1)
    per_scale = per_scale.reshape(*shape, -1).sum(-1) if shape != (1, 1) else per_weight.sum(keepdims=True)
    number = RANDOM.size if count == "matrix" else RANDOM.size // scale.size
    quantize = partial(integer, bits=bits, ste="clipped", count=count)
    to_w, to_scale = learned_gradients(quantize, RANDOM, jnp.asarray(scale), g)
    np.testing.assert_allclose(to_w, g * inside, rtol=1e-6)
    # z near 127 carries an error of 1e-5, sums of 96 terms; relative to the largest entry.
    wanted = per_scale / np.sqrt(number * high)
    np.testing.assert_allclose(to_scale, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "levels", "per_alpha", "outside"), [("seq_ternary", 3, 1.5, 1.0), ("seq_int2", 4, 4, 0.75)]
)
def test_stretched_elastic_gradients(name: str, levels: int, per_alpha: float, outside: float) -> None:
    g = np.random.default_rng(6).standard_normal(RANDOM.shape).astype(np.float32)
    alpha = np.full((6, 1), 1.3, np.float32)
    c = RANDOM.astype(np.float64) / alpha
    inside = np.abs(c) <= 0.99
    codes = np.round(1.5 * c) if levels == 3 else half_open_odd(c * 4)
    v = np.where(inside, codes / per_alpha - c, np.sign(c) * outside)
    to_w, to_alpha = learned_gradients(WEIGHT_QUANTIZERS[name], RANDOM, jnp.asarray(alpha), g)
    np.testing.assert_allclose(to_w, g * inside, rtol=1e-6)
    wanted = (g * v).sum(1, keepdims=True) / np.sqrt(RANDOM.size)
    np.testing.assert_allclose(to_alpha, wanted, rtol=1e-4, atol=1e-6)  # sums of 16 float32 terms


@pytest.mark.parametrize("name", ["binary", "binary_centred", "binary_raw", "bwn"])
def test_elastic_binary_gradients(name: str) -> None:
    """BiT and ParetoQ at one bit: sign for the scale, a window of the scale's own size for the weights."""
    g = np.random.default_rng(7).standard_normal(RANDOM.shape).astype(np.float32)
    scale = np.full((1, 1), 0.8, np.float32)
    inner = RANDOM - RANDOM.mean() if name == "binary_centred" else RANDOM
    quantize = partial(WEIGHT_QUANTIZERS[name], ste="clipped", granularity="tensor")
    to_w, to_scale = learned_gradients(quantize, RANDOM, jnp.asarray(scale), g)
    raw = name in WINDOWED
    window = 0.8 * (np.abs(inner) <= 1) if raw else np.abs(inner) <= 0.8
    np.testing.assert_allclose(to_w, g * window, rtol=1e-6)
    np.testing.assert_allclose(to_scale, (g * np.sign(inner)).sum(keepdims=True) / np.sqrt(96), rtol=1e-4)


@pytest.mark.parametrize("name", ["ternary_absmean", "ternary_absmedian"])
def test_learned_ternary_follows_lsq(name: str) -> None:
    g = np.ones_like(RANDOM)
    to_w, to_scale = learned_gradients(
        partial(WEIGHT_QUANTIZERS[name], ste="clipped"), RANDOM, jnp.full((1, 1), 0.9), g
    )
    z = RANDOM.astype(np.float64) / 0.9
    inside = np.abs(z) <= 1
    np.testing.assert_array_equal(to_w, inside)
    v = np.where(inside, np.round(z) - z, np.sign(z))
    np.testing.assert_allclose(to_scale.item(), v.sum() / np.sqrt(96), rtol=1e-4)


def test_learned_twn_keeps_the_threshold() -> None:
    to_w, to_scale = learned_gradients(
        quantizers.ternary_twn, RANDOM, jnp.full((1, 1), 0.9), np.ones_like(RANDOM)
    )
    codes = np.asarray(quantizers.ternary_twn(jnp.asarray(RANDOM)).codes)
    np.testing.assert_allclose(to_w, np.ones_like(RANDOM), rtol=1e-6)
    np.testing.assert_allclose(to_scale.item(), codes.sum() / np.sqrt(96), rtol=1e-5)


# --- disputed details


@pytest.mark.parametrize(
    ("epsilon", "scale", "codes"),
    [("clamp", 1.0, [1, 0, -1, 1]), ("add", 1.5, [1, 0, -1, 1]), ("divisor", 1.0, [1, 0, -1, 1])],
)
def test_epsilon_of_the_ternary_scale(epsilon: str, scale: float, codes: list) -> None:
    w = jnp.asarray([[1.0, 0.25, -1.75, 1.0]])  # mean |W| = 1
    q = quantizers.ternary_absmean(w, epsilon=epsilon, eps=0.5)
    assert q.scale.item() == pytest.approx(scale)
    np.testing.assert_array_equal(q.codes, [codes])
    # 0.6 is above half of 1 and below half of 1.5: the guard decides its code.
    near = quantizers.ternary_absmean(jnp.asarray([[0.6, 1.4]]), epsilon=epsilon, eps=0.5)
    assert near.codes[0, 0] == (1 if epsilon == "clamp" else 0)


def test_gradient_through_the_centring_and_the_scale() -> None:
    g = np.random.default_rng(8).standard_normal(RANDOM.shape).astype(np.float32)
    stopped = pull(quantizers.binary_centred, RANDOM, g)
    centred = pull(partial(quantizers.binary_centred, centre_gradient=True), RANDOM, g)
    np.testing.assert_allclose(centred, stopped - stopped.mean(), atol=1e-6)
    scaled = pull(partial(quantizers.binary, scale_gradient=True), RANDOM, g)
    sign = np.sign(RANDOM)
    np.testing.assert_allclose(scaled, g + (g * sign).sum() * sign / RANDOM.size, atol=1e-6)


def test_magnitude_aware_window_is_on_the_raw_latents() -> None:
    got = pull(partial(quantizers.binary, window="raw", ste="clipped"), RANDOM, np.ones_like(RANDOM))
    np.testing.assert_allclose(got, np.abs(RANDOM).mean() * (np.abs(RANDOM) <= 1), rtol=1e-6)


def test_stochastic_needs_a_key_and_is_deterministic_without() -> None:
    w = jnp.asarray(np.clip(RANDOM, -0.9, 0.9))
    first = quantizers.binary_stochastic(w, key=jax.random.key(0)).codes
    assert (first != quantizers.binary_stochastic(w, key=jax.random.key(1)).codes).any()
    np.testing.assert_array_equal(first, quantizers.binary_stochastic(w, key=jax.random.key(0)).codes)
    np.testing.assert_array_equal(quantizers.binary_stochastic(w).codes, quantizers.binary_raw(w).codes)
    assert (first != quantizers.binary_raw(w).codes).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(quantizers.binary, window="wide"), "window: got 'wide', expected 'scaled' or 'raw'"),
        (partial(integer, bits=4, levels="odd"), "levels: got 'odd', expected 'zero' or 'midrise'"),
        (partial(integer, bits=8, statistic="absmean"), "statistic: got 'absmean' for 8 bits"),
        (partial(integer, bits=4, scale=np.ones((1, 1), np.float32), count="all"), "count: got 'all'"),
        (partial(quantizers.stretched_elastic, levels=5), "levels: got 5, expected 3 or 4"),
        (partial(quantizers.ternary_absmean, granularity=7), "granularity: got 7 for weights with 16 inputs"),
        (partial(quantizers.ternary_absmean, ste="tanh"), "rounding step: got 'tanh'"),
        (partial(quantizers.ternary_absmean, epsilon="in"), "epsilon: got 'in'"),
    ],
)
def test_wrong_options(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(jnp.asarray(RANDOM))


# --- transformations and dtypes


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_same_bits_compiled_mapped_and_from_bfloat16(name: str, learned: bool) -> None:
    """Packing and training quantize in different programs, which must not show in codes or scales."""
    stack = np.random.default_rng(9).standard_normal((2, 6, 100)).astype(np.float32) * 0.02
    stack[:, 3:] = stack[:, 3:, :1]  # constant rows: each weight is a rounding away from its own mean
    stack = jnp.asarray(stack).astype(jnp.bfloat16)
    scale = jnp.full((6, 4), 0.017) if learned else None
    quantize = partial(WEIGHT_QUANTIZERS[name], granularity=25, scale=scale)

    def with_gradient(w):
        return jax.value_and_grad(lambda w: (quantize(w).dequantize().sum(), quantize(w)), has_aux=True)(w)

    (_, in_training), _ = jax.jit(jax.vmap(with_gradient))(stack)
    for index, w in enumerate(stack):
        one = quantize(w)
        assert one.codes.dtype == one.scale.dtype == jnp.float32
        from_float32 = quantize(w.astype(jnp.float32))
        np.testing.assert_array_equal(one.codes, from_float32.codes)
        np.testing.assert_array_equal(one.codes, in_training.codes[index])
        np.testing.assert_array_equal(one.scale, from_float32.scale)
        np.testing.assert_array_equal(one.scale, in_training.scale[index])
