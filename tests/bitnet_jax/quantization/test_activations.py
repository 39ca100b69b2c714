"""Activation quantizers: forward and backward formulas, edge cases, learned ranges."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization import activations as quantizers
from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS
from bitnet_jax.quantization.ste import surrogate
from bitnet_kernels.reference import digits

LEARNED = ("int8", "int4", "int2", "elastic_signed", "elastic_unsigned")
MEASURED = tuple(name for name, record in ACTIVATION_QUANTIZERS.items() if record.measures_scale)
X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)


def quantize(name: str, **settings):
    """The quantizer, with a learned scale where it requires one."""
    if name not in MEASURED:
        settings = {"scale": jnp.float32(0.75)} | settings
    return partial(ACTIVATION_QUANTIZERS[name], args=Arguments(**settings))


def pull(function, x, g):
    """d(codes * scale)/dx, applied to g."""
    return np.asarray(jax.vjp(lambda x: function(x).dequantize(), jnp.asarray(x))[1](jnp.asarray(g))[0])


def expected(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale [..., 1]) from the formulas, in float64."""
    x = x.astype(np.float64)
    mean = np.abs(x).mean(-1, keepdims=True)
    one = np.ones_like(mean)
    match name:
        case "none":
            return x, one
        case "int8":
            size = np.abs(x).max(-1, keepdims=True)
            return np.round(x * 127 / size), size / 127
        case "int16":
            size = np.abs(x).max(-1, keepdims=True)
            return np.round(x * 32512 / size), size / 32512
        case "int4":
            return np.clip(np.round(np.sqrt(7) * x / (mean + 1e-5)), -8, 7), mean / np.sqrt(7)
        case "int2":
            step = 0.997 * np.sqrt(np.pi / 2) * mean
            return np.clip(2 * np.floor(x / step) + 1, -3, 3), step / 2
        case "sign":
            return np.where(x >= 0, 1, -1), one
        case "sign_absmean":
            return np.where(x >= 0, 1, -1), mean
        case "boolean":
            return np.where(x > 0, 1, 0), one
        case "elastic_signed":
            return np.where(x >= 0, 1, -1), 0.75 * one
        case "elastic_unsigned":
            return np.round(np.clip(x / 0.75, 0, 1)), 0.75 * one
    raise AssertionError(name)


@pytest.mark.parametrize("name", ACTIVATION_QUANTIZERS)
def test_forward_formula(name: str) -> None:
    codes, scale = expected(name, X)
    got = quantize(name)(jnp.asarray(X))
    np.testing.assert_array_equal(got.codes, codes.astype(np.float32))
    np.testing.assert_allclose(got.scale, scale, rtol=1e-6)  # a few float32 operations
    assert got.scale.shape == (5, 1)


@pytest.mark.parametrize("ste", ["identity", "clipped"])
@pytest.mark.parametrize("name", ACTIVATION_QUANTIZERS)
def test_backward_formula(name: str, ste: str) -> None:
    g = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
    codes, scale = expected(name, X)
    z = X / scale
    low, high = {
        "int8": (-128, 127.01),
        "int16": (-32513, 32513),
        "int4": (-8, 7),
        "int2": (-4, 4),
        "none": (-np.inf, np.inf),
    }.get(name, (-1, 1))
    if name == "elastic_unsigned":
        low = 0
    window = (z >= low) & (z <= high) if ste == "clipped" else np.ones_like(z)
    if name in ("sign", "sign_absmean", "boolean"):  # windows on the raw input
        window = scale * (np.abs(X) <= 1) if ste == "clipped" else scale * np.ones_like(z)
    got = pull(quantize(name, ste=ste), X, g)
    # a4.8 divides by mean|x| + 1e-5 and multiplies by mean|x|: 2e-5 here. Otherwise a few ulp.
    np.testing.assert_allclose(got, g * window, rtol=3e-5 if name == "int4" else 1e-6)


@pytest.mark.parametrize("name", ["sign", "sign_absmean", "boolean", "elastic_signed"])
@pytest.mark.parametrize("ste", ["approx_sign", "tanh"])
def test_sign_quantizers_accept_every_ste(name: str, ste: str) -> None:
    q = quantize(name)(jnp.asarray(X))
    z = X / 0.75 if name == "elastic_signed" else X
    slope = np.asarray(surrogate(ste, jnp.asarray(z), 0.7))
    scale = np.asarray(q.scale) if name == "sign_absmean" else 1
    got = pull(quantize(name, ste=ste, progress=0.7), X, np.ones_like(X))
    np.testing.assert_allclose(got, slope * scale, rtol=1e-4, atol=1e-5)


# --- edge tokens


def test_zero_constant_and_tiny_tokens() -> None:
    rows = np.array([[0] * 8, [-0.0] * 8, [1e-40] * 8, [1e-6] * 8, [3.0] * 8, [-3.0] * 8], np.float32)
    for name in ACTIVATION_QUANTIZERS:
        q = quantize(name)(jnp.asarray(rows))
        value = np.asarray(q.dequantize())
        assert np.isfinite(value).all(), name
        assert np.isfinite(pull(quantize(name), rows, np.ones_like(rows))).all(), name
        if name in ("int8", "int4", "boolean", "sign_absmean", "none", "elastic_unsigned"):
            assert np.abs(value[:2]).max() == 0, name
    np.testing.assert_allclose(quantizers.int8(jnp.asarray(rows)).dequantize()[4:], rows[4:], rtol=1e-6)
    # Below the clamp the step is 1e-5 / 127 instead of the token's: 1e-6 becomes round(12.7) steps.
    np.testing.assert_array_equal(quantizers.int8(jnp.asarray(rows)).codes[3], 13)
    np.testing.assert_allclose(quantizers.int8(jnp.asarray(rows)).scale[0], 1e-5 / 127, rtol=1e-6)


def test_signed_zeros() -> None:
    x = jnp.asarray([[0.0, -0.0, 1e-40, -1e-40, 1e-30, -1e-30]])
    np.testing.assert_array_equal(quantizers.sign(x).codes, [[1, 1, 1, 1, 1, -1]])  # subnormals count as zero
    np.testing.assert_array_equal(quantizers.boolean(x).codes, [[0, 0, 0, 0, 1, 0]])


@pytest.mark.parametrize("name", ACTIVATION_QUANTIZERS)
def test_nan_and_infinity_stay_in_their_token(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = X.copy()
        x[2, 3] = bad
        value = np.asarray(quantize(name)(jnp.asarray(x)).dequantize())
        assert np.isfinite(np.delete(value, 2, axis=0)).all()
        if np.isnan(bad):
            assert np.isnan(value[2, 3])
        if name in (
            "int8",
            "int16",
            "int4",
            "int2",
            "sign_absmean",
        ):  # the whole token shares a measured scale
            assert not np.isfinite(value[2]).any()


def test_published_vectors() -> None:
    x = jnp.asarray([[1.0, -0.6, 0.7], [-0.9, 0.4, -1.2], [0.8, -0.5, 0.3]], jnp.float32)
    q = quantizers.int8(x)
    np.testing.assert_array_equal(q.codes, [[127, -76, 89], [-95, 42, -127], [127, -79, 48]])
    np.testing.assert_allclose(1 / q.scale, [[127], [105.83], [158.75]], rtol=1e-4)  # quoted to 5 digits


def test_half_rounds_to_even() -> None:
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0]])  # step exactly 1
    np.testing.assert_array_equal(quantizers.int8(x).codes, [[127, 0, 2, 2, 0, -2, -2, 3]])


@pytest.mark.parametrize("name", [name for name in ACTIVATION_QUANTIZERS if name != "none"])
def test_codes_or_their_digits_fit_in_int8(name: str) -> None:
    x = jnp.asarray(np.random.default_rng(2).standard_cauchy((5, 8)), jnp.float32)
    codes = quantize(name)(x).codes
    for digit in digits(codes) if name == "int16" else (codes,):
        np.testing.assert_array_equal(np.asarray(digit).astype(np.int8), digit)


# --- details on which papers disagree


def test_int8_range_of_the_original_paper() -> None:
    q = quantizers.int8(jnp.asarray([[-2.0, 2.0, 1.0, 0.01]]), peak=128)
    np.testing.assert_array_equal(q.codes, [[-128, 127, 64, 1]])
    np.testing.assert_array_equal(q.scale, [[2 / 128]])


def test_int8_per_tensor() -> None:
    x = jnp.asarray([[1.0, -0.5], [4.0, 2.0]])
    q = quantizers.int8(x, per="tensor")
    np.testing.assert_array_equal(q.codes, [[32, -16], [127, 64]])  # 31.75, -15.875, 127, 63.5
    np.testing.assert_allclose(q.scale, np.full((2, 1), 4 / 127), rtol=1e-6)
    with pytest.raises(ValueError, match="per: got 'row', expected 'token' or 'tensor'"):
        quantizers.int8(x, per="row")


@pytest.mark.parametrize(("epsilon", "scale"), [("clamp", 1 / 127), ("add", 1.5 / 127), ("divisor", 1 / 127)])
def test_int8_epsilon(epsilon: str, scale: float) -> None:
    q = quantizers.int8(jnp.asarray([[1.0, -0.25]]), epsilon=epsilon, eps=0.5)
    np.testing.assert_allclose(q.scale, [[scale]], rtol=1e-6)
    np.testing.assert_array_equal(q.codes, [[127, -32]] if epsilon == "clamp" else [[85, -21]])


def test_int4_clips_at_the_published_thresholds() -> None:
    x = np.random.default_rng(3).standard_normal((1, 4096)).astype(np.float32)
    q = quantizers.int4(jnp.asarray(x))
    top, bottom = float(q.scale.item()) * 7, float(q.scale.item()) * -8
    # 7 b / sqrt(7) = 2.11 sigma and 8 b / sqrt(7) = 2.41 sigma; 5 % tolerance for the sampling error of b.
    assert top == pytest.approx(2.11, rel=0.05)
    assert bottom == pytest.approx(-2.41, rel=0.05)
    heavy = quantizers.int4(jnp.asarray(x), multiplier=2.0)
    np.testing.assert_allclose(heavy.scale, 2 * q.scale, rtol=1e-6)


# --- learned ranges


def gradients(name: str, x: np.ndarray, scale: float, g: np.ndarray, shift=None):
    """With respect to x, the learned scale, and the shift if there is one."""

    def dequantized(x, *learned):
        settings = dict(zip(("scale", "shift"), learned, strict=False))
        return quantize(name, **settings, ste="clipped")(x).dequantize()

    learned = (jnp.float32(scale),) if shift is None else (jnp.float32(scale), shift)
    return [np.asarray(a) for a in jax.vjp(dequantized, jnp.asarray(x), *learned)[1](jnp.asarray(g))]


@pytest.mark.parametrize(
    ("name", "low", "high", "q_max"), [("int8", -128, 127, 127), ("int4", -8, 7, 7), ("int2", -4, 4, 1)]
)
def test_lsq_gradients(name: str, low: int, high: int, q_max: int) -> None:
    scale = 1.5 / high
    z = X.astype(np.float64) / scale
    inside = (z >= low) & (z <= high)
    assert 0 < inside.sum() < inside.size
    codes = np.clip(2 * np.floor(z / 2) + 1, -3, 3) if name == "int2" else np.clip(np.round(z), low, high)
    g = np.random.default_rng(4).standard_normal(X.shape).astype(np.float32)
    to_x, to_scale = gradients(name, X, scale, g)
    np.testing.assert_allclose(to_x, g * inside, rtol=1e-6)
    wanted = (g * np.where(inside, codes - z, codes)).sum() / np.sqrt(8 * q_max)
    np.testing.assert_allclose(to_scale, wanted, rtol=1e-4, atol=1e-5)  # z near 127 carries an error of 1e-5


def test_elastic_signed_gradients() -> None:
    g = np.random.default_rng(5).standard_normal(X.shape).astype(np.float32)
    shift = np.linspace(-0.3, 0.4, 8, dtype=np.float32)
    to_x, to_scale, to_shift = gradients("elastic_signed", X, 0.75, g, jnp.asarray(shift))
    moved = X - shift
    window = np.abs(moved) <= 0.75
    np.testing.assert_allclose(to_x, g * window, rtol=1e-6)
    np.testing.assert_allclose(to_shift, -(g * window).sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_scale, (g * np.sign(moved)).sum() / np.sqrt(8), rtol=1e-5)


def test_elastic_unsigned_gradients() -> None:
    g = np.random.default_rng(6).standard_normal(X.shape).astype(np.float32)
    shift = np.linspace(-0.3, 0.4, 8, dtype=np.float32)
    to_x, to_scale, to_shift = gradients("elastic_unsigned", X, 0.75, g, jnp.asarray(shift))
    z = (X.astype(np.float64) - shift) / 0.75
    inside = (z >= 0) & (z <= 1)
    assert inside.any()
    np.testing.assert_allclose(to_x, g * inside, rtol=1e-6)
    np.testing.assert_allclose(to_shift, -(g * inside).sum(0), rtol=1e-5, atol=1e-6)
    v = np.where(inside, np.round(z) - z, np.where(z > 1, 1, 0))
    np.testing.assert_allclose(to_scale, (g * v).sum() / np.sqrt(8), rtol=1e-5)


def test_elastic_edge_cases() -> None:
    x = jnp.asarray([[0.0, -0.0, 0.25, 0.250001, 0.5, 0.75, -1.0, jnp.inf]])
    q = quantizers.elastic_unsigned(x, Arguments(scale=jnp.float32(0.5)))
    np.testing.assert_array_equal(q.codes, [[0, 0, 0, 1, 1, 1, 0, 1]])  # half of the scale rounds to 0
    to_x, _ = gradients("elastic_unsigned", np.asarray(x), 0.5, np.ones((1, 8), np.float32))
    np.testing.assert_array_equal(to_x, [[1, 1, 1, 1, 1, 0, 0, 0]])  # both end points pass the gradient


@pytest.mark.parametrize("name", ["elastic_signed", "elastic_unsigned"])
def test_elastic_scale_gradient_by_finite_differences(name: str) -> None:
    """Where no code changes and the window is closed, the elastic gradient equals the true derivative."""
    x, eps = np.float32([[3.0, 4, 5, 9]]) * (1 if name == "elastic_unsigned" else -1), 1e-2
    loss = lambda scale: quantize(name, scale=scale)(jnp.asarray(x)).dequantize().sum()  # noqa: E731
    numerical = (loss(jnp.float32(1 + eps)) - loss(jnp.float32(1 - eps))) / (2 * eps)
    got = jax.grad(loss)(jnp.float32(1.0)) * np.sqrt(4)  # without the 1/sqrt(N)
    np.testing.assert_allclose(got, numerical, rtol=1e-4)  # float32 difference quotient


def test_elastic_without_a_scale() -> None:
    with pytest.raises(ValueError, match="elastic_signed: got no scale, expected a learned one"):
        quantizers.elastic_signed(jnp.asarray(X))


@pytest.mark.parametrize("name", ["sign", "sign_absmean", "boolean"])
def test_learned_threshold(name: str) -> None:
    shift = jnp.full(8, 0.5)
    q = quantize(name, shift=shift)(jnp.asarray(X))
    np.testing.assert_array_equal(q.codes > 0, X > 0.5)
    to_shift = jax.grad(lambda b: quantize(name, shift=b)(jnp.asarray(X)).codes.sum())(shift)
    np.testing.assert_array_equal(to_shift, np.full(8, -5.0))


# --- transformations and dtypes


@pytest.mark.parametrize(
    ("name", "scale"), [(name, None) for name in MEASURED] + [(name, 0.037) for name in LEARNED]
)
def test_bit_identical_under_jit_vmap_and_for_bfloat16_input(name: str, scale: float | None) -> None:
    x = jnp.asarray(np.random.default_rng(8).standard_normal((2, 3, 100)), jnp.bfloat16)
    args = Arguments(scale=None if scale is None else jnp.float32(scale))
    function = partial(ACTIVATION_QUANTIZERS[name], args=args)
    q = function(x)
    assert q.codes.dtype == q.scale.dtype == jnp.float32
    assert q.scale.shape == (2, 3, 1)
    mapped = jax.jit(jax.vmap(jax.vmap(function)))(x)  # each token alone
    np.testing.assert_array_equal(q.codes, mapped.codes)
    np.testing.assert_array_equal(q.scale, mapped.scale)
