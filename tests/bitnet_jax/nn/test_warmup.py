"""Warm-up of quantization and of sub norms, in a layer and in a model: exact at both ends, and the blend between."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES

pytestmark = pytest.mark.optimized

N, K = 24, 64
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, K)), jnp.float32)
NAMES = ["bitnet_b158", "bitnet", "int4_a16", "bit", "paretoq_1.58", "uint4_group32", "bwn"]


def recipe(name: str, warmup: float) -> Precision:
    precision = RECIPES[name]
    assert isinstance(precision, Precision)
    return dataclasses.replace(precision, warmup=warmup)


def outcome(precision: Precision, params: dict, progress: float) -> tuple[jax.Array, ...]:
    """Output and gradients of a layer at a progress that is known only when it runs, as in training."""

    @jax.jit
    def of(params: dict, x: jax.Array, progress: jax.Array) -> tuple[jax.Array, ...]:
        def loss(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = BitLinear(N, precision).apply({"params": params}, x, progress)
            return jnp.sum(jnp.sin(y)), y

        gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, *jax.tree.leaves(gradients)

    return of(params, X, jnp.float32(progress))


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_begins_as_float_and_ends_as_quantized_bit_for_bit(name: str) -> None:
    warm, plain = recipe(name, 0.5), recipe(name, 0.0)
    params = BitLinear(N, plain).init(jax.random.key(1), X)["params"]
    y, *_ = outcome(warm, params, 0.0)
    floats, *_ = outcome(Precision(), {"weight": params["weight"]}, 0.0)
    np.testing.assert_array_equal(y, floats)
    for progress in (0.5, 0.9, 1.0):
        for got, expected in zip(
            outcome(warm, params, progress), outcome(plain, params, progress), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    assert (outcome(plain, params, 0.0)[0] != y).any()


def test_the_blend_by_hand() -> None:
    """Ternary with scale 1 = mean|w|: codes of 0.4, -1.6, 1.0 are 0, -1, 1; at half of the warm-up, w/2 + code/2."""
    precision = Precision(weight="ternary_absmean", warmup=0.5)
    params = {"weight": jnp.array([[0.4, -1.6, 1.0]])}
    x = jnp.array([[1.0, 10.0, 100.0]])

    def y(params: dict) -> jax.Array:
        return BitLinear(1, precision).apply({"params": params}, x, jnp.float32(0.25))[0, 0]

    assert float(y(params)) == pytest.approx(0.2 - 13.0 + 100.0, rel=1e-6)
    np.testing.assert_allclose(jax.grad(y)(params)["weight"], x)  # slope 1 of both, halved and added


SHAPE = dict(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, ffn_size=24, max_length=8)
TOKENS = jnp.arange(8, dtype=jnp.int32)[None]


def test_a_model_begins_as_float_and_without_progress_it_is_quantized() -> None:
    warm, plain, floats = (
        ModelConfig(**SHAPE, precision=rule) for rule in ("bitnet_b158(warmup=0.2)", "bitnet_b158", "float32")
    )
    variables = init_variables(plain, jax.random.key(0))

    def logits(config: ModelConfig, **given: jax.Array) -> jax.Array:
        module = config.module()
        return jax.jit(lambda v, given: module.apply(v, TOKENS, **given).logits)(variables, given)

    np.testing.assert_array_equal(logits(warm, progress=jnp.float32(0)), logits(floats))
    np.testing.assert_array_equal(logits(warm, progress=jnp.float32(0.3)), logits(plain))
    np.testing.assert_array_equal(logits(warm), logits(plain))
    middle = logits(warm, progress=jnp.float32(0.1))
    assert (middle != logits(plain)).any()
    assert (middle != logits(floats)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inserted_sub_norms_leave_the_function_unchanged_at_first(dtype: str) -> None:
    def config(**fields: object) -> ModelConfig:
        return ModelConfig(**SHAPE, precision="float32", dtype=dtype, **fields)

    warm, plain, without = config(sub_norm_warmup=0.2), config(), config(norm_placement="pre")
    variables = init_variables(plain, jax.random.key(0))

    def logits(config: ModelConfig, **given: jax.Array) -> jax.Array:
        module = config.module()
        return jax.jit(lambda v, given: module.apply(v, TOKENS, **given).logits)(variables, given)

    np.testing.assert_array_equal(logits(warm, progress=jnp.float32(0)), logits(without))
    np.testing.assert_array_equal(logits(warm, progress=jnp.float32(0.3)), logits(plain))
    np.testing.assert_array_equal(logits(warm), logits(plain))
    assert (logits(warm, progress=jnp.float32(0.1)) != logits(plain)).any()
    assert (logits(without) != logits(plain)).any()


def test_codes_kept_for_the_backward_pass_exclude_a_warm_up() -> None:
    with pytest.raises(ValueError, match="model.remat: got 'codes' with a precision with warmup"):
        ModelConfig(**SHAPE, precision="bitnet_b158(warmup=0.2)", remat="codes")
