"""BitLinear in its three states: float, latent and packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.nn.linear import BitLinear, quantized_matmul
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.quantization.scales import Quantized
from bitnet_kernels import pack

pytestmark = pytest.mark.optimized

N, K = 48, 256
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, K)), jnp.float32)


def layer(precision: Precision, **options: object) -> tuple[BitLinear, dict[str, jax.Array]]:
    module = BitLinear(N, precision, **options)
    return module, module.init(jax.random.key(1), X)["params"]


def recipe(name: str) -> Precision:
    precision = RECIPES[name]
    assert isinstance(precision, Precision)
    return precision


def test_a_float_layer_is_a_dense_layer() -> None:
    module, params = layer(recipe("float32"), use_bias=True)
    params["bias"] = jnp.arange(N, dtype=jnp.float32)
    expected = np.asarray(X) @ np.asarray(params["weight"]).T + np.arange(N, dtype=np.float32)
    # float32 sums of 256 products in a different order
    np.testing.assert_allclose(module.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-4)


def test_the_bfloat16_recipe_rounds_its_operands() -> None:
    module, params = layer(recipe("bfloat16"))
    x, w = (np.asarray(a.astype(jnp.bfloat16), np.float32) for a in (X, params["weight"]))
    np.testing.assert_allclose(module.apply({"params": params}, X), x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_codes_are_exact(groups: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = Quantized(rng.integers(-128, 128, (2, 3, K)).astype(np.float32), np.full((2, 3, 1), 0.5, np.float32))
    scale = 2.0 ** rng.integers(-3, 3, (N, groups)).astype(np.float32)  # powers of two: scaling is exact too
    w = Quantized(rng.integers(-1, 2, (N, K)).astype(np.float32), scale)
    y = quantized_matmul(jax.tree.map(jnp.asarray, x), jax.tree.map(jnp.asarray, w), dtype)
    full = w.codes * np.repeat(scale, K // groups, axis=1)
    np.testing.assert_array_equal(y, (x.codes.astype(np.float64) @ full.T.astype(np.float64)) * 0.5)


@pytest.mark.extended(after=2)
@pytest.mark.parametrize(
    "name", ["bitnet", "bitnet_b158", "bitnet_b158_channel", "bitnet_group64", "xnor", "bnn", "int8_a16"]
)
def test_packed_and_latent_are_bit_identical(name: str) -> None:
    precision = recipe(name)
    module, params = layer(precision)
    quantized = precision.quantize_weight(params["weight"])
    assert precision.packed_format is not None
    packed = pack(quantized.codes.astype(jnp.int8), quantized.scale, precision.packed_format)
    apply = jax.jit(module.apply)
    latent, ours = apply({"params": params}, X), apply({"packed": {"weight": packed}}, X)
    np.testing.assert_array_equal(latent, ours)


@pytest.mark.parametrize("name", ["bitnet_b158", "int8_a16"])
def test_gradients_equal_those_of_fake_quantization(name: str) -> None:
    module, params = layer(recipe(name))
    g = jax.random.normal(jax.random.key(2), (3, 5, N))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(module.apply({"params": {"weight": w}}, x) * g)

    dw, dx = jax.grad(loss, argnums=(0, 1))(params["weight"], X)
    xq = recipe(name).quantize_activation(X).dequantize()
    wq = recipe(name).quantize_weight(params["weight"]).dequantize()
    # identity through both quantizers (papers: dL/dW = g^T x_q, dL/dx = g W_q), up to the order of float32 sums, and
    # to the rounding of scales to float16, which the slope of the codes does not know
    rtol = 2.0**-11 if recipe(name).scale_dtype == "float16" else 1e-4
    np.testing.assert_allclose(dw, jnp.einsum("btn,btk->nk", g, xq), rtol=rtol, atol=1e-4)
    np.testing.assert_allclose(dx, jnp.einsum("btn,nk->btk", g, wq), rtol=1e-4, atol=1e-4)


def test_a_learned_scale_is_a_parameter_with_a_gradient() -> None:
    module, params = layer(recipe("paretoq_1"))
    assert params["weight_scale"].shape == (N, 1)
    gradient = jax.grad(lambda p: jnp.sum(jnp.square(module.apply({"params": p}, X))))(params)
    assert float(jnp.abs(gradient["weight_scale"]).min()) > 0


def test_stochastic_weights_need_a_key_to_be_random() -> None:
    module, params = layer(recipe("binaryconnect_stochastic"))
    plain = module.apply({"params": params}, X)
    first, again, other = (
        module.apply({"params": params}, X, rngs={"stochastic": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != plain).any()


def test_the_packed_weight_of_another_layer_is_rejected() -> None:
    module, _ = layer(recipe("bitnet"))
    packed = pack(jnp.ones((N + 1, K), jnp.int8), jnp.ones((1, 1)), "binary")
    with pytest.raises(ValueError, match=r"packed weight is \(49, 256\), expected \(48, 256\)"):
        module.apply({"packed": {"weight": packed}}, X)
