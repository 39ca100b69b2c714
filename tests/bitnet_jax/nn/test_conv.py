"""Convolutions as matrix products of patches: against XLA's convolution, XNOR-Net's formula, and packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.nn.conv import BitConv, patches
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_kernels import pack

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 6, 5)), jnp.float32)
N = 12


def convolution(x: jax.Array, weight: jax.Array, kernel: int, stride: int, padding: int) -> jax.Array:
    """XLA's convolution, with the weight [n, kh kw C] as [kh, kw, C, n]."""
    n, channels = weight.shape[0], x.shape[-1]
    return jax.lax.conv_general_dilated(
        x,
        weight.reshape(n, kernel, kernel, channels).transpose(1, 2, 3, 0),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 0), (1, 1, 0)])
def test_a_float_layer_is_a_convolution(kernel: int, stride: int, padding: int) -> None:
    layer = BitConv(N, Precision(), kernel=kernel, stride=stride, padding=padding, init_std=1.0)
    params = layer.init(jax.random.key(1), X)["params"]
    expected = convolution(X, params["weight"], kernel, stride, padding)
    # float32 sums of up to 45 products in a different order
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-4)


def test_the_gradient_is_that_of_a_convolution() -> None:
    layer = BitConv(N, Precision(), init_std=1.0)
    params = layer.init(jax.random.key(1), X)["params"]
    g = jax.random.normal(jax.random.key(2), (2, 7, 6, N))
    ours = jax.grad(lambda p, x: jnp.sum(layer.apply({"params": p}, x) * g), argnums=(0, 1))(params, X)
    theirs = jax.grad(lambda w, x: jnp.sum(convolution(x, w, 3, 1, 1) * g), argnums=(0, 1))(
        params["weight"], X
    )
    np.testing.assert_allclose(ours[0]["weight"], theirs[0], rtol=1e-4, atol=1e-4)  # summation order
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_the_scale_of_a_window_is_the_scale_map_of_xnor_net() -> None:
    """I * W ~ (sign I conv sign W) K alpha, K = box filter of the channel mean of |I|; zero padding has sign +1."""
    precision = RECIPES["xnor"]
    assert isinstance(precision, Precision)
    layer = BitConv(N, precision)
    params = layer.init(jax.random.key(1), X)["params"]
    weight = params["weight"]
    padded = jnp.pad(X, ((0, 0), (1, 1), (1, 1), (0, 0)))
    K = convolution(jnp.mean(jnp.abs(padded), axis=-1, keepdims=True), jnp.full((1, 9), 1 / 9), 3, 1, 0)
    signs = convolution(jnp.where(padded >= 0, 1.0, -1.0), jnp.where(weight >= 0, 1.0, -1.0), 3, 1, 0)
    expected = signs * K * jnp.mean(jnp.abs(weight), axis=-1)[None, None, None]
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bnn", "xnor", "bitnet_b158", "binaryconnect"])
def test_packed_equals_latent(name: str) -> None:
    precision = RECIPES[name]
    assert isinstance(precision, Precision)
    layer = BitConv(N, precision, stride=2)
    params = layer.init(jax.random.key(1), X)["params"]
    quantized = precision.quantize_weight(params["weight"])
    assert precision.packed_format is not None
    packed = pack(quantized.codes.astype(jnp.int8), quantized.scale, precision.packed_format)
    apply = jax.jit(layer.apply)
    latent, ours = apply({"params": params}, X), apply({"packed": {"weight": packed}}, X)
    if precision.activation == "none":  # a float product in a different order
        np.testing.assert_allclose(latent, ours, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(latent, ours)


def test_products_of_signs_are_exact_integers() -> None:
    precision = RECIPES["bnn"]
    assert isinstance(precision, Precision)
    layer = BitConv(N, precision)
    weight = layer.init(jax.random.key(1), X)["params"]["weight"]
    x = np.where(np.asarray(patches(X, 3, padding=1)) >= 0, 1, -1)
    expected = x @ np.where(np.asarray(weight) >= 0, 1, -1).T
    packed = pack(jnp.where(weight >= 0, 1, -1).astype(jnp.int8), jnp.ones((1, 1)), "binary")
    np.testing.assert_array_equal(layer.apply({"packed": {"weight": packed}}, X), expected)


def test_an_image_smaller_than_a_window_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"got an image of \(2, 2\) pixels, expected at least 3 x 3"):
        patches(jnp.zeros((1, 2, 2, 1)), 3)
