"""Generation with an exact head gives the tokens of the bfloat16 head, greedy and with top-k sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.inference.exact_head import COLLECTION, with_exact_head
from bitnet_jax.inference.generation import generate, left_pad, stream_tokens
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing

pytestmark = pytest.mark.optimized

CONFIG = ModelConfig(
    vocab_size=203, hidden_size=32, num_layers=1, num_heads=2, ffn_size=32, max_length=40, mlp="relu2",
    init_std=0.5, embedding_dtype="bfloat16",
)  # fmt: skip
TOKENS, MASK = left_pad([[3, 1, 4, 1, 5], [9, 2, 6]])
N = 20


def packed(config: ModelConfig) -> dict[str, Any]:
    params = jax.jit(Transformer(config).init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))["params"]
    return packing.pack(params, config)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return packed(CONFIG)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05),
        # slow, as the previous ones compile the same code: no filter but top_k
        pytest.param(SamplingConfig(temperature=3.0, top_k=7), marks=pytest.mark.slow),
    ],
)
def test_tokens_equal_those_of_the_bfloat16_head(variables: dict[str, Any], sampling: SamplingConfig) -> None:
    exact = with_exact_head(CONFIG, variables)
    arguments: dict[str, Any] = {"max_new_tokens": N, "sampling": sampling, "key": jax.random.key(4)}
    expected = np.asarray(generate(CONFIG, variables, TOKENS, MASK, **arguments).tokens)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(generate(CONFIG, exact, TOKENS, MASK, **arguments).tokens, expected)
    chunks = list(stream_tokens(CONFIG, exact, TOKENS, MASK, chunk=7, **arguments))
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected)


@pytest.mark.slow
def test_an_untied_head_and_bfloat16_activations() -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=False, dtype="bfloat16")
    variables = packed(config)
    exact = with_exact_head(config, variables)
    assert exact[COLLECTION].table is variables["params"]["lm_head"]["weight"]
    expected = generate(config, variables, TOKENS, MASK, max_new_tokens=N).tokens
    np.testing.assert_array_equal(generate(config, exact, TOKENS, MASK, max_new_tokens=N).tokens, expected)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingConfig(temperature=1.0), "got temperature=1.0 without top_k, expected top_k"),
        (SamplingConfig(temperature=1.0, top_p=0.9), "expected top_k"),
        (SamplingConfig(repetition_penalty=1.1), "got repetition_penalty=1.1, expected 1"),
    ],
)
def test_sampling_that_needs_all_logits_is_rejected(
    variables: dict[str, Any], sampling: SamplingConfig, message: str
) -> None:
    exact = with_exact_head(CONFIG, variables)
    for function in (generate, stream_tokens):
        with pytest.raises(ValueError, match=message):
            function(CONFIG, exact, TOKENS, MASK, max_new_tokens=N, sampling=sampling, key=jax.random.key(0))


def test_models_without_a_bfloat16_head_are_rejected(variables: dict[str, Any]) -> None:
    float32 = dataclasses.replace(CONFIG, embedding_dtype="float32")
    with pytest.raises(ValueError, match="got embed/embedding: float32, expected a head stored in bfloat16"):
        with_exact_head(float32, packed(float32))
    with pytest.raises(ValueError, match="got a model with head='int8', expected 'float'"):
        with_exact_head(*packing.with_head(CONFIG, variables, "int8"))
