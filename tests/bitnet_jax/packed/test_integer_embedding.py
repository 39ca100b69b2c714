"""Embedding tables of integers: looked up, multiplied as a head, trained, packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.inference.generation import left_pad
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.nn.embedding import Embedding
from bitnet_jax.packed import packing
from bitnet_jax.packed.latent import unpack_model, with_float_tables
from bitnet_jax.packed.proof import logits, prove
from bitnet_kernels import dequantize

SHAPE: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 40, "max_length": 48,
}  # fmt: skip
TOKENS, MASK = left_pad([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3]])


def init(config: ModelConfig) -> dict[str, Any]:
    return jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.mark.optimized
@pytest.mark.parametrize("embedding", ["int8", "int4", "uint4"])
def test_packed_and_latent_integers_are_bit_identical(embedding: str) -> None:
    config = ModelConfig(**SHAPE, embedding_dtype=embedding)
    module, params = Embedding.of(config, config.vocab_size, "embed"), init(config)
    latent, packed = {"params": params["embed"]}, {"packed": packing.pack(params, config)["packed"]["embed"]}
    np.testing.assert_array_equal(module.apply(latent, TOKENS), module.apply(packed, TOKENS))
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))
    attend = jax.jit(lambda variables, x: module.apply(variables, x, method="attend"))
    np.testing.assert_array_equal(attend(latent, x), attend(packed, x))
    table = np.asarray(dequantize(packed["packed"]["weight"]))
    half_step = 0.51 / 32512 * np.abs(x).max(-1, keepdims=True)  # of the input in 16 bits
    assert (np.abs(attend(packed, x) - x @ table.T) <= half_step * np.abs(table).sum(1) + 1e-6).all()


@pytest.mark.extended(after=1)
@pytest.mark.optimized
@pytest.mark.parametrize(("embedding", "tied"), [("int8", True), ("int4", False)])
def test_an_integer_embedding_is_packed_and_is_the_head(embedding: str, tied: bool) -> None:
    shape = SHAPE | {"embedding_dtype": embedding, "tie_embeddings": tied}
    config = ModelConfig(**shape, position="learned")
    params = init(config)
    packed = packing.pack(params, config)
    assert packed["params"].keys() == params.keys() - {"embed", "lm_head"}
    assert {path for path in packed["packed"] if "layer" not in path} == (
        {"embed"} if tied else {"embed", "lm_head"}
    )
    prove(config, {"params": params}, packed, TOKENS, MASK)
    assert packing.sizes(packed).embeddings < packing.sizes({"params": params}).embeddings

    again = packing.pack(unpack_model(config, packed)["params"], config)["packed"]["embed"]["weight"]
    np.testing.assert_array_equal(again.codes, packed["packed"]["embed"]["weight"].codes)

    # One integer table: looked up and multiplied with the same values, the input of the head in 16 bits.
    table = np.asarray(dequantize(packed["packed"]["embed"]["weight"]))
    floats, variables = with_float_tables(config, packed)
    np.testing.assert_array_equal(variables["params"]["embed"]["embedding"], table)
    np.testing.assert_array_equal(
        with_float_tables(config, {"params": params})[1]["params"]["embed"]["embedding"], table
    )
    ours, theirs = (logits(c.module(), v, TOKENS, MASK) for c, v in ((config, packed), (floats, variables)))
    # As above for the head, 1 in 2e4, after layers whose inputs may round to other codes.
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_a_head_with_a_recipe_keeps_it_when_the_table_becomes_floats() -> None:
    rules = (("lm_head", "bitnet_b158"), ("*", "bitnet_b158"))
    config = ModelConfig(**SHAPE, embedding_dtype="int8", tie_embeddings=False, precision=rules)
    packed = packing.pack(init(config), config)
    changed, variables = with_float_tables(config, packed)
    assert variables["packed"]["lm_head"] == packed["packed"]["lm_head"]
    assert jax.tree.structure(packing.abstract(changed)) == jax.tree.structure(dict(variables))


def test_an_integer_embedding_trains() -> None:
    config = ModelConfig(**SHAPE, embedding_dtype="int8", precision="float32")
    params = init(config)

    def loss(params):
        return jnp.mean(config.module().apply({"params": params}, TOKENS, mask=MASK).logits ** 2)

    gradient = jax.jit(jax.grad(loss))(params)["embed"]["embedding"]
    floats = dataclasses.replace(config, embedding_dtype="float32")
    rounded_params = with_float_tables(config, {"params": params})[1]["params"]

    def float_loss(params):
        return jnp.mean(floats.module().apply({"params": params}, TOKENS, mask=MASK).logits ** 2)

    expected = jax.jit(jax.grad(float_loss))(rounded_params)["embed"]["embedding"]
    # straight through both roundings: the gradient at the rounded table
    np.testing.assert_allclose(gradient, expected, rtol=0.01, atol=1e-3 * np.abs(expected).max())


def test_an_integer_embedding_is_its_own_head_and_has_whole_groups() -> None:
    with pytest.raises(ValueError, match="expected head='float': the head multiplies with the integers"):
        ModelConfig(**SHAPE, embedding_dtype="int8", head="int8")
    with pytest.raises(
        ValueError, match="model.embedding_dtype='int8': got hidden_size=24, expected a multiple of 32"
    ):
        ModelConfig(**SHAPE | {"hidden_size": 24}, embedding_dtype="int8")
