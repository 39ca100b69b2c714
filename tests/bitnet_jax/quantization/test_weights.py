"""Every weight quantizer: forward and backward formulas, edge values, bit-identical results in every program."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS
from bitnet_jax.quantization.ste import surrogate

BINARY = ("binary", "binary_centred", "binary_raw", "binary_stochastic", "bwn")
TERNARY = ("ternary_absmean", "ternary_absmedian", "ternary_twn", "seq_ternary")
LEVELS = {name: {-1, 1} for name in BINARY} | {name: {-1, 0, 1} for name in TERNARY}
LEVELS["zero_one"] = {0, 1}
LEVELS |= {"int2": {-3, -1, 1, 3}, "seq_int2": {-3, -1, 1, 3}}
LEVELS["uint4"] = set(range(16))
LEVELS |= {f"int{bits}": set(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) for bits in (3, 4, 6, 8)}
LEARNED = [name for name, record in WEIGHT_QUANTIZERS.items() if "scale" in record.uses]
WINDOWED = ("binary_raw", "binary_stochastic", "bwn")  # their STE window applies to the raw latents

RANDOM = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)


def told(name: str, granularity="tensor", **settings) -> Arguments:
    """Arguments for a quantizer, without the granularity if its scale is always 1."""
    uses_it = "granularity" in WEIGHT_QUANTIZERS[name].uses
    return Arguments(granularity=granularity if uses_it else "tensor", **settings)


def pull(quantize, w, g, args: Arguments = DEFAULT):
    """d(codes * scale)/dw, applied to g."""
    back = jax.vjp(lambda w: quantize(w, args).dequantize(), jnp.asarray(w))[1]
    return np.asarray(back(jnp.asarray(g))[0])


def over(w: np.ndarray, granularity, reduce) -> np.ndarray:
    """A statistic of the weights that share a scale, broadcast over them, in float64."""
    w = w.astype(np.float64)
    groups = {"tensor": w.reshape(1, -1), "channel": w}.get(granularity)
    if groups is None:
        groups = w.reshape(-1, granularity)
    return np.repeat(reduce(groups, axis=1), groups.shape[1]).reshape(w.shape)


def half_open_odd(z: np.ndarray) -> np.ndarray:
    return np.clip(2 * np.floor(z / 2) + 1, -3, 3)


def expected(name: str, w: np.ndarray, granularity) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale broadcast over the weights) from the formulas, in float64."""
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
        case "int3" | "int4" | "int6" | "int8":
            high = 2 ** (int(name[3]) - 1) - 1
            scale = over(np.abs(w), granularity, np.max) / high
            return np.clip(np.round(w / scale), -high - 1, high), scale
        case "uint4":
            low = over(w, granularity, np.min)
            scale = (over(w, granularity, np.max) - low) / 15
            return np.clip(np.trunc((w - low) / scale + 0.5), 0, 15), scale
    raise AssertionError(name)


def minimum_of(name: str, w: np.ndarray, granularity) -> np.ndarray:
    return over(w, granularity, np.min) if name == "uint4" else np.zeros(w.shape)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_forward_formula(name: str, granularity) -> None:
    codes, scale = expected(name, RANDOM, granularity)
    got = WEIGHT_QUANTIZERS[name](jnp.asarray(RANDOM), told(name, granularity))
    np.testing.assert_array_equal(got.codes, codes)
    # A mean over 96 float32 values and a few products: a few ulp.
    values = codes * scale + minimum_of(name, RANDOM, granularity)
    np.testing.assert_allclose(got.dequantize(), values, rtol=1e-6, atol=1e-6 if name == "uint4" else 0)
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
    if name in ("int3", "int4", "int6", "int8"):
        high = 2 ** (int(name[3]) - 1) - 1 + 1e-5  # the largest weight is an end point, up to rounding
        low = -high - 1
    if name == "uint4":
        z, low, high = (w - minimum_of(name, RANDOM, granularity)) / scale, 0, 15.5
    window = (z >= low) & (z <= high) if ste == "clipped" else np.ones_like(z)
    if name in WINDOWED:
        window = scale * (np.abs(w) <= 1) if ste == "clipped" else scale * np.ones_like(z)
    if name == "bwn":
        window = window + 1 / {"tensor": 96, 4: 4}[granularity]
    got = pull(WEIGHT_QUANTIZERS[name], RANDOM, g, told(name, granularity, ste=ste))
    # scale * (1 / scale) and the like: a few float32 ulp.
    np.testing.assert_allclose(got, g * window, rtol=2e-6)


@pytest.mark.parametrize("ste", ["approx_sign", "swish_sign", "tanh", "reste"])
@pytest.mark.parametrize("name", BINARY)
def test_binary_quantizers_accept_every_ste(name: str, ste: str) -> None:
    args = told(name, "channel" if name == "bwn" else "tensor", ste=ste, progress=0.8)
    got = pull(WEIGHT_QUANTIZERS[name], RANDOM, np.ones_like(RANDOM), args)
    q = WEIGHT_QUANTIZERS[name](jnp.asarray(RANDOM), args)
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
    """No division by zero; zeros and subnormals quantize to values of the order of the floor."""
    w = np.full(RANDOM.shape, value, np.float32)  # one shape for all: compiled once
    q = WEIGHT_QUANTIZERS[name](jnp.asarray(w), told(name, "channel"))
    codes, scale, values = np.asarray(q.codes), np.asarray(q.scale), np.asarray(q.dequantize())
    assert set(np.unique(codes)) <= LEVELS[name]
    assert len(np.unique(codes)) == 1
    assert np.isfinite(scale).all()
    assert (scale > 0).all() or name == "uint4"  # whose minimum is the value
    grad = pull(WEIGHT_QUANTIZERS[name], w, np.ones_like(w), told(name, "channel"))
    assert np.isfinite(grad).all()
    if value and abs(value) < 1 and abs(value) > 1e-30 and name not in ("seq_ternary", "seq_int2", "int2"):
        expected_value = (
            -1 if name == "binary_centred" else 1
        )  # all weights equal their mean: sign(0) is -1 here
        size = 1 if name in ("binary_raw", "binary_stochastic") else abs(value)
        np.testing.assert_allclose(values, expected_value * size * np.ones_like(w), rtol=1e-6)
    if abs(value) < 1e-30:
        unscaled = name in ("binary_raw", "binary_stochastic")
        assert np.abs(values).max() <= (1 if unscaled else 1.1e-5)
        if name in TERNARY + ("int3", "int4", "int6", "int8"):
            assert not codes.any()


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
def test_nan_propagates(name: str) -> None:
    w = RANDOM.copy()
    w[2, 5] = np.nan
    value = np.asarray(WEIGHT_QUANTIZERS[name](jnp.asarray(w), told(name, "channel")).dequantize())
    assert np.isnan(value[2, 5])
    if name not in ("binary_raw", "binary_stochastic"):  # a measured scale is shared
        assert np.isnan(value[2]).all()
    assert np.isfinite(np.delete(value, 2, axis=0)).all()


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinity_affects_only_its_row(name: str, infinity: float) -> None:
    w = RANDOM.copy()
    w[2, 5] = infinity
    value = np.asarray(WEIGHT_QUANTIZERS[name](jnp.asarray(w), told(name, "channel")).dequantize())
    assert np.isfinite(np.delete(value, 2, axis=0)).all()
    if name in ("binary_raw", "binary_stochastic", "ternary_absmedian"):  # their scale does not depend on it
        assert value[2, 5] == np.sign(infinity) * np.abs(value[2]).max()
    else:
        assert not np.isfinite(value[2]).any()
    if name not in LEARNED:
        return
    learned = WEIGHT_QUANTIZERS[name](jnp.asarray(w), told(name, "channel", scale=jnp.full((6, 1), 0.7)))
    if name != "binary_centred" and name != "ternary_twn":  # these two still measure a mean
        assert np.isfinite(learned.dequantize()).all()
        assert abs(learned.codes[2, 5]) == max(
            (abs(code) for code in LEVELS[name] if code * infinity > 0), default=0
        )


# --- transformations and dtypes


@pytest.mark.extended(after=10)
@pytest.mark.parametrize(
    ("name", "learned"), [*((name, False) for name in WEIGHT_QUANTIZERS), *((name, True) for name in LEARNED)]
)
def test_bit_identical_under_jit_vmap_and_for_bfloat16_input(name: str, learned: bool) -> None:
    """Packing and training quantize in different programs, which must not affect codes or scales."""
    stack = np.random.default_rng(9).standard_normal((2, 6, 100)).astype(np.float32) * 0.02
    stack[:, 3:] = stack[:, 3:, :1]  # constant rows: each weight is one rounding error away from the mean
    stack = jnp.asarray(stack).astype(jnp.bfloat16)
    scale = jnp.full((6, 4), 0.017) if learned else None
    quantize = partial(WEIGHT_QUANTIZERS[name], args=told(name, 25, scale=scale))

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
        if one.minimum is not None:
            np.testing.assert_array_equal(one.minimum, in_training.minimum[index])
