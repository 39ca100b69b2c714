"""Prompt look-up: the drafts, and that they change the number of passes and nothing else."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.inference import exact_head, generation, steps
from bitnet_jax.inference.generation import generate, stream_tokens
from bitnet_jax.inference.prompt_lookup import draft
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=64, max_length=200,
    init_std=0.5, position="learned", precision="bitnet_b158", embedding_dtype="bfloat16",
)  # fmt: skip
PROMPT = np.asarray([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 1, 4]])
N = 60
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.95)
PENALIZED = SamplingConfig(temperature=0.5, top_k=5, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"]
    return packing.pack(params, CONFIG)


def looked_up(text: list[int], count: int) -> tuple[list[int], bool]:
    """By a plain loop over the earlier places."""
    last = len(text) - 1
    best, length = 0, 0
    for place in range(last):
        n = 0
        while n < 3 and place >= n and text[place - n] == text[last - n]:
            n += 1
        if n >= max(length, 1):
            best, length = place, n
    return [text[best + 1 + i % (last - best)] for i in range(count)], length >= 2


def test_the_draft_follows_the_newest_of_the_longest_occurrences() -> None:
    compiled = jax.jit(draft, static_argnums=2)
    random = np.random.default_rng(0)
    found = 0
    for length in range(2, 41):
        text = random.integers(0, 4, length).tolist()
        row = jnp.asarray(text + [3, 1, 2] * ((43 - length) // 3) + [0] * ((43 - length) % 3))
        tokens, known = compiled(row, length - 1, 5)
        expected, expected_known = looked_up(text, 5)
        assert bool(known) == expected_known
        if known:
            assert tokens.tolist() == expected
        found += expected_known
    assert 20 < found < 39


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
@pytest.mark.parametrize("drafted", [1, 7])
def test_the_tokens_are_those_of_plain_decoding(
    variables: dict[str, Any], sampling: SamplingConfig, drafted: int
) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": N, "sampling": sampling, "key": jax.random.key(5)}
    plain = generate(CONFIG, variables, PROMPT, **arguments)
    fast = generate(CONFIG, variables, PROMPT, prompt_lookup=drafted, **arguments)
    np.testing.assert_array_equal(fast.tokens, plain.tokens)
    assert plain.passes == N - 1
    assert fast.passes < N - 1  # some drafts were right
    chunks = stream_tokens(CONFIG, variables, PROMPT, prompt_lookup=drafted, chunk=4, **arguments)
    streamed = list(chunks)
    assert max(chunk.shape[1] for chunk in streamed) <= 4
    np.testing.assert_array_equal(np.concatenate(streamed, axis=1), plain.tokens)


@pytest.mark.extended
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "int8"])
def test_the_cache_is_bit_identical_to_that_of_plain_decoding(
    variables: dict[str, Any], kv_format: str
) -> None:
    """Keys and values of all layers: the drafts change no bit of what is computed, not only no token."""

    def after(drafted: int) -> steps.State:
        run = generation._checked(CONFIG, variables, PROMPT, None, N, GREEDY, None, (), kv_format, drafted)
        return run.advance(run.grown(run.start()), N)

    plain, fast = after(0), after(5)
    assert int(fast.passes) < int(plain.passes)
    length = int(plain.cache.length)
    assert int(fast.cache.length) == length
    np.testing.assert_array_equal(fast.cache.valid, plain.cache.valid)
    for leaf, expected in zip(
        jax.tree.leaves(fast.cache.layers), jax.tree.leaves(plain.cache.layers), strict=True
    ):
        np.testing.assert_array_equal(leaf[:, :length], expected[:, :length])


@pytest.mark.extended
def test_an_end_token_ends_the_text_within_a_draft(variables: dict[str, Any]) -> None:
    tokens = np.asarray(generate(CONFIG, variables, PROMPT, max_new_tokens=N).tokens)[0]
    for end in sorted(set(tokens.tolist())):
        plain = generate(CONFIG, variables, PROMPT, max_new_tokens=N, eos_ids=[end])
        fast = generate(CONFIG, variables, PROMPT, max_new_tokens=N, eos_ids=[end], prompt_lookup=7)
        np.testing.assert_array_equal(fast.tokens, plain.tokens)
        assert fast.lengths.tolist() == plain.lengths.tolist()


@pytest.mark.extended
def test_up_to_the_last_position_of_the_model(variables: dict[str, Any]) -> None:
    """Where a draft does not fit into the cache, tokens are generated one by one."""
    new = CONFIG.max_length - PROMPT.shape[1]
    plain = generate(CONFIG, variables, PROMPT, max_new_tokens=new)
    fast = generate(CONFIG, variables, PROMPT, max_new_tokens=new, prompt_lookup=7)
    np.testing.assert_array_equal(fast.tokens, plain.tokens)


@pytest.mark.extended
def test_with_an_exact_head(variables: dict[str, Any]) -> None:
    exact = exact_head.with_exact_head(CONFIG, variables)
    plain = generate(CONFIG, variables, PROMPT, max_new_tokens=N)
    fast = generate(CONFIG, exact, PROMPT, max_new_tokens=N, prompt_lookup=5)
    np.testing.assert_array_equal(fast.tokens, plain.tokens)
    assert fast.passes < plain.passes


def test_refused_requests(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="for 2 prompts, expected one"):
        generate(CONFIG, variables, np.repeat(PROMPT, 2, 0), max_new_tokens=3, prompt_lookup=4)
    with pytest.raises(ValueError, match="prompt_lookup: got -1"):
        generate(CONFIG, variables, PROMPT, max_new_tokens=3, prompt_lookup=-1)
    linear = dataclasses.replace(CONFIG, attention="linear")
    with pytest.raises(ValueError, match="linear attention, expected 0"):
        generate(linear, variables, PROMPT, max_new_tokens=3, prompt_lookup=4)


@pytest.mark.extended
@pytest.mark.parametrize("kv_format", ["bfloat16", "int8"])
def test_a_step_does_not_copy_the_cache(variables: dict[str, Any], kv_format: str) -> None:
    config = dataclasses.replace(CONFIG, max_length=20_000, position="rope")
    run = generation._checked(config, variables, PROMPT, None, 19_900, GREEDY, None, (), kv_format, 7)
    state = jax.eval_shape(lambda: steps.with_room(run.room, run.start()))
    step = jax.jit(partial(steps.advance, config, 7), donate_argnums=3)
    compiled = step.lower(variables, run.filters, run.eos, state, run.key, 3).compile()
    one = state.cache.layers[0].k
    assert compiled.memory_analysis().temp_size_in_bytes < one.size * one.dtype.itemsize
