"""The quantizers against vectors computed by Hugging Face transformers, and the two registries of names.

Codes match exactly, scales within one float32 ulp: a mean is a sum, whose order differs between libraries.
(Codes could differ only where a weight times 1 / scale is within an ulp of a half; no vector has such a weight.)
Dequantized activations are within 3 float32 ulp: the library divides, q / s, where we multiply, q * (1 / s), as one
multiplication after an integer matmul does (one ulp); and torch computes s as (1 / max) * 127, we as 127 / max (one
ulp of s, rounded again in 1 / s).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bitnet_jax.quantization.scales import Quantized

pytestmark = pytest.mark.optimized

ternary, int8 = WEIGHT_QUANTIZERS["ternary_absmean"], ACTIVATION_QUANTIZERS["int8"]


@pytest.fixture(scope="module")
def vectors(oracles: Path):
    return np.load(oracles / "hf_bitnet" / "quant_vectors.npz")


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["w", "w_zero", "w_mix"])
def test_ternary_weights(vectors, name: str, compiled: bool) -> None:
    quantize = jax.jit(ternary) if compiled else ternary
    q = quantize(jnp.asarray(vectors[name]))
    for run in ("eager", "compiled"):
        wanted = vectors[f"fp32/{run}/weight_quant_{name}"]
        np.testing.assert_array_equal(q.codes, np.sign(wanted))
        np.testing.assert_array_max_ulp(np.asarray(q.dequantize()), wanted, 1)
    if name == "w":
        np.testing.assert_array_equal(q.codes, vectors["ternary"])
        # autobit stores the float32 mean, bitlinear its reciprocal.
        np.testing.assert_allclose(q.scale[0], vectors["fp32/autobit_weight_scale"], rtol=2e-7)
        np.testing.assert_allclose(1 / q.scale[0], vectors["fp32/bitlinear_weight_scale"], rtol=2e-7)


def test_ternary_weights_from_bfloat16(vectors) -> None:
    q = ternary(jnp.asarray(vectors["w"]).astype(jnp.bfloat16))
    wanted = vectors["bf16/eager/weight_quant_w"]  # the library rounds the result to bfloat16 again
    np.testing.assert_array_equal(q.codes, np.sign(wanted))
    # One ulp of the float32 scale may cross a bfloat16 rounding boundary; a bfloat16 ulp is 2^-8 to 2^-7 relative.
    got = q.dequantize().astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(got, wanted, rtol=2.0**-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_int8_activations(vectors, compiled: bool) -> None:
    quantize = jax.jit(int8) if compiled else int8
    q = quantize(jnp.asarray(vectors["x"]))
    np.testing.assert_array_equal(q.codes, vectors["fp32/eager/bitlinear_act_q"])
    np.testing.assert_array_max_ulp(np.asarray(q.dequantize()), vectors["fp32/eager/act_quant"], 3)
    s = np.float32(127) / np.maximum(np.abs(vectors["x"]).max(-1, keepdims=True), np.float32(1e-5))
    np.testing.assert_array_max_ulp(s, vectors["fp32/eager/bitlinear_act_scale"], 1)
    np.testing.assert_array_equal(q.scale, 1 / s)
    np.testing.assert_array_max_ulp(np.asarray(q.dequantize()), np.asarray(q.codes) / s, 1)


def test_int8_activations_from_bfloat16(vectors) -> None:
    """AutoBitLinear quantizes in float32 and rounds the result to bfloat16."""
    q = int8(jnp.asarray(vectors["bf16/x"]).astype(jnp.bfloat16))
    got = q.dequantize().astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(got, vectors["bf16/eager/act_quant"])


def test_straight_through_gradients(vectors) -> None:
    x, w, gy = (jnp.asarray(vectors[name]) for name in ("x", "w", "ste/gy"))
    y, pull = jax.vjp(lambda x, w: int8(x).dequantize() @ ternary(w).dequantize().T, x, w)
    gx, gw = pull(gy)
    # Sums of 32 or 7 products in a different order from torch: a few ulp of the largest term.
    for got, wanted in ((y, "ste/eager/y"), (gx, "ste/eager/gx"), (gw, "ste/eager/gw")):
        scale = np.abs(vectors[wanted]).max()
        np.testing.assert_allclose(got, vectors[wanted], rtol=1e-5, atol=1e-6 * scale)


def test_integer_products_reproduce_the_offline_layer(vectors) -> None:
    """codes @ codes, then both scales: the operation order of the packed layer."""
    x, w = int8(jnp.asarray(vectors["x"])), ternary(jnp.asarray(vectors["w"]))
    y = (x.codes @ w.codes.T) * w.scale * x.scale
    wanted = vectors["fp32/eager/bitlinear_y"]
    np.testing.assert_allclose(
        y, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max()
    )  # three roundings instead of two


def measured_or_fixed_scale(name: str) -> Callable[[jax.Array], Quantized]:
    """The quantizer of this name with the arguments it needs."""
    if name in ACTIVATION_QUANTIZERS:
        record = ACTIVATION_QUANTIZERS[name]
        return partial(record, args=Arguments(scale=None if record.measures_scale else jnp.float32(0.75)))
    weights = WEIGHT_QUANTIZERS[name]
    return partial(
        weights, args=Arguments(granularity="channel" if "granularity" in weights.uses else "tensor")
    )


@pytest.mark.extended(after=1)
# Op by op for a shape whose reduction XLA splits, compiled for all; every quantizer of a shape is in one program.
@pytest.mark.parametrize(
    ("shape", "compiled"),
    [((3, 8), True), ((64, 640), True), ((640, 64), True), ((2, 96, 128), True), ((64, 640), False)],
)
def test_nan_propagates_for_every_shape(shape: tuple[int, ...], compiled: bool) -> None:
    """XLA's maximum on CPUs drops NaN where it splits a reduction, which it does for some shapes."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    at = tuple(size // 2 for size in shape)
    row = at[:-1]
    bad = x.copy()
    bad[at] = np.nan

    def run(bad: jax.Array, x: jax.Array) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        of_matrices = WEIGHT_QUANTIZERS if len(shape) == 2 else ()
        quantizers = {name: measured_or_fixed_scale(name) for name in [*of_matrices, *ACTIVATION_QUANTIZERS]}
        return {name: (q(bad).dequantize(), q(x).scale, q(2 * x).scale) for name, q in quantizers.items()}

    results = (jax.jit(run) if compiled else run)(jnp.asarray(bad), jnp.asarray(x))
    for name, (value, scale, scale_of_twice) in results.items():
        value = np.asarray(value)
        assert np.isnan(value[at]), name
        others = np.delete(value.reshape(-1, shape[-1]), np.ravel_multi_index(row, shape[:-1]), axis=0)
        assert np.isfinite(others).all(), name
        # A measured scale (one that doubles with its input) spreads the NaN to all elements that share it.
        measured = not np.array_equal(scale, scale_of_twice)
        assert not measured or np.isnan(value[row]).all(), name
