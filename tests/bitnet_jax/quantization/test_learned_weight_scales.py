"""Weight quantizers with a learned scale: gradients with respect to the scale and the weights."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization import multilevel_weights
from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.multilevel_weights import integer
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS

WINDOWED = ("binary_raw", "binary_stochastic", "bwn")  # their STE window applies to the raw latents
RANDOM = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)


def half_open_odd(z: np.ndarray) -> np.ndarray:
    return np.clip(2 * np.floor(z / 2) + 1, -3, 3)


def learned_gradients(quantize, w, scale, g, **settings):
    """Of codes * scale, with respect to w and the learned scale."""
    dequantized = lambda w, scale: quantize(w, Arguments(scale=scale, **settings)).dequantize()  # noqa: E731
    return [np.asarray(a) for a in jax.vjp(dequantized, jnp.asarray(w), scale)[1](jnp.asarray(g))]


@pytest.mark.extended(after=6)
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
    quantize = partial(integer, bits=bits, count=count)
    to_w, to_scale = learned_gradients(quantize, RANDOM, jnp.asarray(scale), g, ste="clipped")
    np.testing.assert_allclose(to_w, g * inside, rtol=1e-6)
    # z near 127 has an error of 1e-5, in sums of 96 terms; relative to the largest entry.
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
    to_w, to_alpha = learned_gradients(WEIGHT_QUANTIZERS[name], RANDOM, jnp.asarray(alpha), g, ste="clipped")
    np.testing.assert_allclose(to_w, g * inside, rtol=1e-6)
    wanted = (g * v).sum(1, keepdims=True) / np.sqrt(RANDOM.size)
    np.testing.assert_allclose(to_alpha, wanted, rtol=1e-4, atol=1e-6)  # sums of 16 float32 terms


@pytest.mark.parametrize("name", ["binary", "binary_centred", "binary_raw", "bwn"])
def test_elastic_binary_gradients(name: str) -> None:
    """BiT and ParetoQ at one bit: sign for the scale, a window as wide as the scale for the weights."""
    g = np.random.default_rng(7).standard_normal(RANDOM.shape).astype(np.float32)
    scale = np.full((1, 1), 0.8, np.float32)
    inner = RANDOM - RANDOM.mean() if name == "binary_centred" else RANDOM
    to_w, to_scale = learned_gradients(WEIGHT_QUANTIZERS[name], RANDOM, jnp.asarray(scale), g, ste="clipped")
    raw = name in WINDOWED
    window = 0.8 * (np.abs(inner) <= 1) if raw else np.abs(inner) <= 0.8
    np.testing.assert_allclose(to_w, g * window, rtol=1e-6)
    np.testing.assert_allclose(to_scale, (g * np.sign(inner)).sum(keepdims=True) / np.sqrt(96), rtol=1e-4)


@pytest.mark.parametrize("name", ["ternary_absmean", "ternary_absmedian"])
def test_learned_ternary_follows_lsq(name: str) -> None:
    g = np.ones_like(RANDOM)
    to_w, to_scale = learned_gradients(
        WEIGHT_QUANTIZERS[name], RANDOM, jnp.full((1, 1), 0.9), g, ste="clipped"
    )
    z = RANDOM.astype(np.float64) / 0.9
    inside = np.abs(z) <= 1
    np.testing.assert_array_equal(to_w, inside)
    v = np.where(inside, np.round(z) - z, np.sign(z))
    np.testing.assert_allclose(to_scale.item(), v.sum() / np.sqrt(96), rtol=1e-4)


def test_learned_twn_keeps_the_threshold() -> None:
    to_w, to_scale = learned_gradients(
        multilevel_weights.ternary_twn, RANDOM, jnp.full((1, 1), 0.9), np.ones_like(RANDOM)
    )
    codes = np.asarray(multilevel_weights.ternary_twn(jnp.asarray(RANDOM)).codes)
    np.testing.assert_allclose(to_w, np.ones_like(RANDOM), rtol=1e-6)
    np.testing.assert_allclose(to_scale.item(), codes.sum() / np.sqrt(96), rtol=1e-5)
