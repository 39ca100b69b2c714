"""Low-rank adapters of linear layers: their term by hand, after the norm, with the same bits in any batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer, init_variables
from bitnet_jax.nn.adapter import COLLECTION, adapter_output
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.nn.products import ordered_product
from bitnet_jax.packed import packing
from bitnet_jax.quantization.recipes import RECIPES

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_size": 64,
    "max_length": 16,
}


def adapter_of(config: ModelConfig, rank: int = 3, seed: int = 7) -> dict[str, Any]:
    """Values for every linear layer of the blocks, nested as in the variables of a model."""
    tree: dict[str, Any] = {}
    for i, (path, (n, k)) in enumerate(config.linear_shapes().items()):
        a_key, b_key = jax.random.split(jax.random.key(seed + i))
        layer = tree
        for name in path.split("/"):
            layer = layer.setdefault(name, {})
        layer |= {
            "a": jax.random.normal(a_key, (rank, k)) / 8,
            "b": jax.random.normal(b_key, (n, rank)) / 8,
            "scale": jnp.linspace(0.5, 2.0, rank, dtype=jnp.float32),
        }
    return tree


def test_the_output_by_hand() -> None:
    adapter = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [-1.0]]), "scale": jnp.array([0.5])}
    found = adapter_output(jnp.array([[[2.0, 1.0], [0.0, -1.0]]]), adapter)
    np.testing.assert_array_equal(found, [[[6.0, -2.0], [-3.0, 1.0]]])  # a x = 4, -2; halved; times b


@pytest.mark.parametrize("recipe", ["float32", "bitnet_b158", "int8_a16"])
def test_the_term_is_added_to_the_layer_and_takes_the_normalized_input(recipe: str) -> None:
    x = jax.random.normal(jax.random.key(0), (5, 32)) * 3
    model = ModelConfig(**SHAPE, precision=recipe, norm_placement="inside")
    layer = BitLinear.of(model, 6, RECIPES[recipe], "q_proj")  # type: ignore[arg-type]
    variables = layer.init(jax.random.key(1), x)
    adapter = {
        "a": jax.random.normal(jax.random.key(2), (2, 32)),
        "b": jax.random.normal(jax.random.key(3), (6, 2)),
        "scale": jnp.full(2, 0.25),
    }
    plain = layer.apply(variables, x)
    found = layer.apply({**variables, COLLECTION: adapter}, x)
    normalized = np.asarray(x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)), np.float64)
    term = 0.25 * normalized @ np.asarray(adapter["a"], np.float64).T @ np.asarray(adapter["b"], np.float64).T
    np.testing.assert_allclose(found - plain, term, rtol=1e-4, atol=1e-4)
    none = {**adapter, "b": jnp.zeros((6, 2))}
    np.testing.assert_array_equal(layer.apply({**variables, COLLECTION: none}, x), plain)


def test_a_row_of_an_ordered_product_does_not_depend_on_the_others_or_on_the_gradient() -> None:
    x = jax.random.normal(jax.random.key(0), (9, 70))
    w = jax.random.normal(jax.random.key(1), (5, 70))
    whole = np.asarray(jax.jit(ordered_product)(x, w))
    for i in range(9):
        np.testing.assert_array_equal(ordered_product(x[i : i + 1], w), whole[i : i + 1])
    value, back = jax.vjp(ordered_product, x, w)
    np.testing.assert_array_equal(value, whole)
    dx, dw = back(jnp.ones_like(value))
    np.testing.assert_allclose(dx, np.ones((9, 5)) @ np.asarray(w), rtol=1e-5)
    np.testing.assert_allclose(dw, np.ones((5, 9)) @ np.asarray(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["bitnet_b158", "float32"])
def test_packed_and_latent_models_agree_with_an_adapter_and_a_row_is_that_of_any_batch(recipe: str) -> None:
    config = ModelConfig(**SHAPE, precision=recipe)
    latent = init_variables(config, jax.random.key(0))
    packed = packing.pack(latent["params"], config)
    adapter, tokens = adapter_of(config), jax.random.randint(jax.random.key(3), (3, 8), 0, 40)
    apply = jax.jit(Transformer(config).apply)
    ours = apply({**latent, COLLECTION: adapter}, tokens).logits
    theirs = apply({**packed, COLLECTION: adapter}, tokens).logits
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(ours - apply(latent, tokens).logits)) > 0.01  # the adapter does something
    if recipe != "float32":  # products of XLA's floats depend on the batch
        alone = apply({**packed, COLLECTION: adapter}, tokens[1:2]).logits
        np.testing.assert_allclose(alone, theirs[1:2], rtol=1e-6, atol=1e-6)
