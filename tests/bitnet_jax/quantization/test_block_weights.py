"""Weights in blocks of 32 against gguf-py, which reproduces llama.cpp's quantizers bit for bit."""

from __future__ import annotations

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS
from bitnet_jax.quantization.scales import float16_values

pytestmark = pytest.mark.optimized

BLOCK = 32
TYPES = {"int8_group32": Type.Q8_0, "int4_group32": Type.Q4_0, "uint4_group32": Type.Q4_1}


def weights() -> np.ndarray:
    """Blocks of usual sizes, with ties, of zeros, of one value, of one sign, and with scales that float16 rounds to
    subnormal numbers and to zero."""
    w = np.random.default_rng(0).standard_normal((300, 256)).astype(np.float32) * np.float32(0.02)
    w[0] = 0
    w[1] = np.float32(0.3)
    w[2] = -np.abs(w[2])
    w[3] = np.abs(w[3]) + 7
    w[4] *= np.float32(1e-4)
    w[5] *= np.float32(1e-7)
    w[6] = np.tile(np.arange(-16, 16) / 2, 8)  # halves, and one magnitude with both signs
    w[7] = np.tile(np.concatenate([[127], np.arange(-15, 16) + 0.5]), 8)
    w[8] = np.tile(np.concatenate([[-8], np.arange(-15, 16) / 2]), 8)
    w[9, ::2] = -0.0
    return w


def blocks(kind: Type, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(codes, float16 scales, float16 minima) of gguf-py."""
    packed = gguf.quants.quantize(w, kind).reshape(w.shape[0], w.shape[1] // BLOCK, -1)
    scale = packed[..., :2].copy().view(np.float16)[..., 0]
    if kind is Type.Q8_0:
        return packed[..., 2:].view(np.int8).reshape(w.shape), scale, None
    data = packed[..., 4:] if kind is Type.Q4_1 else packed[..., 2:]
    codes = np.concatenate([data & 15, data >> 4], axis=-1).reshape(w.shape).astype(np.int8)
    if kind is Type.Q4_0:
        return codes - 8, scale, None
    return codes, scale, packed[..., 2:4].copy().view(np.float16)[..., 0]


def precision_of(recipe: str, **changes: Any) -> Precision:
    found = RECIPES[recipe]
    assert isinstance(found, Precision)
    return Precision.from_dict({**vars(found), **changes})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", TYPES)
def test_codes_scales_and_minima_are_those_of_gguf_py(recipe: str, compiled: bool) -> None:
    w, quantize = weights(), precision_of(recipe).quantize_weight
    codes, scale, minimum = blocks(TYPES[recipe], w)
    got = (jax.jit(quantize) if compiled else quantize)(jnp.asarray(w))
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(np.asarray(got.scale).astype(np.float16), scale)
    np.testing.assert_array_equal(np.asarray(got.scale), scale.astype(np.float32))  # already rounded
    if minimum is None:
        assert got.minimum is None
    else:
        np.testing.assert_array_equal(np.asarray(got.minimum), minimum.astype(np.float32))
    exact = gguf.quants.dequantize(gguf.quants.quantize(w, TYPES[recipe]), TYPES[recipe])
    np.testing.assert_array_equal(got.dequantize(), exact)


@pytest.mark.parametrize("recipe", TYPES)
def test_a_dequantized_matrix_quantizes_to_itself(recipe: str) -> None:
    quantize = jax.jit(precision_of(recipe).quantize_weight)
    w = np.delete(weights(), [4, 5], axis=0)  # scales that float16 rounds to few bits are measured anew
    once = quantize(jnp.asarray(w))
    again = quantize(once.dequantize())
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 16])
def test_the_largest_magnitude_of_signed_codes_is_the_lowest_code(granularity: Any) -> None:
    w = weights()[10:20]
    q = WEIGHT_QUANTIZERS["int4"](jnp.asarray(w), Arguments(granularity=granularity), statistic="signed")
    rows = {"tensor": (1, -1), "channel": (10, -1), 16: (160, 16)}[granularity]
    each = w.reshape(rows)
    largest = each[np.arange(len(each)), np.abs(each).argmax(axis=1)]
    np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1), largest / -8)
    assert (np.asarray(q.codes).reshape(rows).min(axis=1) == -8).all()
    assert (q.scale < 0).any() or granularity == "tensor"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "signed", "levels": "midrise"}, "levels: got 'midrise' with statistic='signed'"),
        ({"statistic": "signed", "rounding": "away"}, "statistic: got 'signed' with .*rounding='away'"),
        ({"rounding": "up"}, "rounding: got 'up', expected 'even' or 'away'"),
    ],
)
def test_options_that_exclude_each_other_are_errors(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WEIGHT_QUANTIZERS["int4"](jnp.ones((2, 4)), Arguments(), **options)
    with pytest.raises(ValueError, match="learned scale: got True with statistic='signed'"):
        WEIGHT_QUANTIZERS["int4"](jnp.ones((2, 4)), Arguments(scale=jnp.ones((1, 1))), statistic="signed")


@pytest.mark.parametrize("ste", ["identity", "clipped"])
@pytest.mark.parametrize("recipe", TYPES)
def test_gradients_go_straight_through_to_the_weights(recipe: str, ste: str) -> None:
    """Except for the rounding of the scale, which the forward pass multiplies by and the slope does not divide by."""
    precision = precision_of(recipe, weight_ste=ste)
    w = jnp.asarray(weights()[10:20])
    g = np.random.default_rng(1).standard_normal(w.shape).astype(np.float32)
    _, back = jax.vjp(lambda w: precision.quantize_weight(w).dequantize(), w)
    dw = np.asarray(back(jnp.asarray(g))[0])
    inside = np.ones(w.shape, bool)
    if (recipe, ste) == ("int4_group32", "clipped"):  # +8 does not exist
        inside = np.asarray(w).reshape(10, 8, 32) / (
            np.abs(np.asarray(w)).reshape(10, 8, 32).max(axis=-1, keepdims=True) / 8
        )
        codes = np.asarray(precision_of(recipe, scale_dtype="float32").quantize_weight(w).codes)
        inside = (np.abs(inside.reshape(w.shape)) <= 7.5) | (codes < 0)
    np.testing.assert_allclose(dw, g * inside, rtol=2.0**-11 + 1e-6)  # a float16 ulp


def test_float16_values_are_those_of_the_conversion() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        middles = halves[:-1] / 2 + halves[1:] / 2
        x = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9)])
    x = np.concatenate([x, np.random.default_rng(0).standard_normal(10000).astype(np.float32) * 1e-4])
    x = np.where(np.abs(x) < 1e-37, 0, x)  # XLA flushes subnormal float32 numbers
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    for function in (float16_values, jax.jit(float16_values)):
        got = np.asarray(function(jnp.asarray(x)))
        np.testing.assert_array_equal(got, expected)
        signs = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(got)[signs], np.signbit(expected)[signs])
    assert jax.grad(float16_values)(0.1) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "float", "scale_dtype": "float16"}, "scale_dtype: got 'float16' with weight='float'"),
        (
            {"weight": "int4", "activation": "int8", "scale": "learned", "scale_dtype": "float16"},
            "scale='learned'",
        ),
        ({"weight": "uint4", "activation": "int8", "scale": "learned"}, "weight with scale='learned'"),
    ],
)
def test_scales_that_cannot_be_float16_or_learned_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precision(**fields)  # type: ignore[arg-type]


def test_a_scale_beyond_float16_is_infinite() -> None:
    q = precision_of("int4_group32").quantize_weight(jnp.full((1, 32), 8 * 70000.0))
    assert np.isinf(q.scale).all()
