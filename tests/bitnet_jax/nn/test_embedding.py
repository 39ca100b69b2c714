"""Embedding tables: look-ups and logits of latent and stored values agree, and gradients pass through rounding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig
from bitnet_jax.nn.embedding import Embedding
from bitnet_jax.quantization.precision import Precision

V, D = 37, 24
X = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)
IDS = jnp.asarray([[1, 4, 36]])


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=V, hidden_size=D, num_layers=1, num_heads=2, ffn_size=8, max_length=4, **changes
    )


def table(embedding: Embedding) -> np.ndarray:
    latent = embedding.init(jax.random.key(0), IDS)["params"][embedding.parameter]
    return np.asarray(latent, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [None, Precision(), Precision(compute_dtype="bfloat16")])
def test_stored_and_latent_values_give_the_same_results(
    dtype: str, stored: str, recipe: Precision | None
) -> None:
    settings = config(dtype=dtype, embedding_dtype=stored)
    embedding = Embedding.of(settings, V, "embed") if recipe is None else Embedding.head(settings, recipe)
    latent = table(embedding)
    kept = {"params": {embedding.parameter: jnp.asarray(latent, stored)}}
    variables = {"params": {embedding.parameter: jnp.asarray(latent)}}
    np.testing.assert_array_equal(embedding.apply(kept, IDS), embedding.apply(variables, IDS))
    attend = jax.jit(lambda v: embedding.apply(v, jnp.asarray(X, dtype), method="attend"))
    logits = attend(kept)
    assert logits.dtype == jnp.float32
    # The same products, summed in a different order.
    np.testing.assert_allclose(logits, attend(variables), rtol=1e-5, atol=1e-6)

    operand = ml_dtypes.bfloat16 if embedding.dtype == "bfloat16" else np.float32
    x, rows = X.astype(dtype).astype(operand), latent.astype(stored).astype(operand)
    expected = x.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)  # float32 sums of 24 products


def test_the_gradient_passes_straight_through_the_rounding() -> None:
    embedding = Embedding.of(config(embedding_dtype="bfloat16"), V, "embed")
    latent = jnp.asarray(table(embedding))

    def total(latent: jax.Array) -> jax.Array:
        logits = embedding.apply({"params": {"embedding": latent}}, jnp.asarray(X), method="attend")
        return jnp.sum(logits[..., 5])

    gradient = np.asarray(jax.grad(total)(latent))
    np.testing.assert_allclose(gradient[5], X.sum((0, 1)), rtol=1e-5, atol=1e-6)
    assert not gradient[:5].any()
