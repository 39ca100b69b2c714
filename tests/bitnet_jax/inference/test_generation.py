"""Generation: the decode loop against the definition (the full text recomputed for each token), and edge cases."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.inference import generation, steps
from bitnet_jax.inference.cache import init_cache
from bitnet_jax.inference.generation import generate, left_pad, stream_tokens
from bitnet_jax.inference.programs import Programs
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.nn.linear_attention import LinearState
from bitnet_jax.packed import packing

CONFIG = ModelConfig(
    vocab_size=23, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=32, max_length=40,
    mlp="relu2", init_std=0.5, tie_embeddings=False, precision="float32",
)  # fmt: skip
N = 14
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]]
TOKENS, MASK = left_pad(PROMPTS)


def init(config: ModelConfig) -> dict[str, Any]:
    return jax.jit(Transformer(config).init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return init(CONFIG)


@pytest.fixture(scope="module")
def greedy(variables: dict[str, Any]) -> np.ndarray:
    return np.asarray(generate(CONFIG, variables, TOKENS, MASK, max_new_tokens=N).tokens)


def test_left_pad() -> None:
    assert TOKENS.tolist() == [[3, 1, 4, 1, 5], [0, 0, 9, 2, 6], [0, 5, 3, 5, 8]]
    assert MASK.astype(int).tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    for empty in ([], [[1], []]):
        with pytest.raises(ValueError, match="expected at least one token in each"):
            left_pad(empty)


def whole_text_logits(config: ModelConfig, variables: dict[str, Any], text: np.ndarray) -> np.ndarray:
    mask = np.pad(MASK, ((0, 0), (0, N)), constant_values=True)
    return np.asarray(_whole_text(config, variables, text.astype(np.int32), mask))


@partial(jax.jit, static_argnums=0)
def _whole_text(
    config: ModelConfig, variables: dict[str, Any], text: jax.Array, mask: jax.Array
) -> jax.Array:
    return Transformer(config).apply(variables, text, mask=mask).logits


def test_greedy_is_the_argmax_over_the_full_text(variables: dict[str, Any], greedy: np.ndarray) -> None:
    assert greedy.shape == (3, N)
    assert len(np.unique(greedy)) > 3  # a text, not a single repeated token
    logits = whole_text_logits(CONFIG, variables, np.concatenate([TOKENS, greedy], axis=1))
    np.testing.assert_array_equal(greedy, np.argmax(logits[:, TOKENS.shape[1] - 1 : -1], axis=-1))


@pytest.mark.extended
@pytest.mark.optimized
def test_a_row_does_not_depend_on_padding_or_on_other_rows(
    variables: dict[str, Any], greedy: np.ndarray
) -> None:
    # One more row and one more column of padding: every row moves.
    tokens, mask = left_pad([[7] * 6, *PROMPTS])
    padded = generate(CONFIG, variables, tokens, mask, max_new_tokens=N).tokens
    np.testing.assert_array_equal(padded[1:], greedy)
    # Alone, and up to the model's last position: padding uses no position, so 3 tokens leave room for 37.
    tokens, mask = np.pad(TOKENS[1:2], ((0, 0), (4, 0))), np.pad(MASK[1:2], ((0, 0), (4, 0)))
    alone = generate(CONFIG, variables, tokens, mask, max_new_tokens=37).tokens
    np.testing.assert_array_equal(alone[:, :N], greedy[1:2])
    with pytest.raises(ValueError, match="prompt of 3 tokens and 38 new ones"):
        generate(CONFIG, variables, tokens, mask, max_new_tokens=38)


def test_an_end_token_ends_its_row_and_the_last_one_ends_the_loop(
    variables: dict[str, Any], greedy: np.ndarray
) -> None:
    ends = {int(row[4]) for row in greedy}
    first = np.asarray([min(i for i, token in enumerate(row) if int(token) in ends) for row in greedy])
    tokens, lengths, _ = generate(CONFIG, variables, TOKENS, MASK, max_new_tokens=N, eos_ids=sorted(ends))
    np.testing.assert_array_equal(lengths, first + 1)
    for row, expected, length in zip(np.asarray(tokens), greedy, np.asarray(lengths), strict=True):
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert not row[length:].any()
    chunks = list(
        stream_tokens(CONFIG, variables, TOKENS, MASK, max_new_tokens=N, eos_ids=sorted(ends), chunk=2)
    )
    # The loop itself stopped: no more tokens were generated than the longest row needed.
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), tokens[:, : lengths.max()])
    np.testing.assert_array_equal(
        generate(CONFIG, variables, TOKENS, MASK, max_new_tokens=N, eos_ids=()).lengths, [N] * 3
    )


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("kv_format", [None, "float32", "bfloat16", "int8"])
def test_each_cache_format_generates_the_same_text(
    variables: dict[str, Any], greedy: np.ndarray, kv_format: str | None
) -> None:
    """Streaming changes nothing; rounding the cache changes a token only where two logits are close."""
    tokens = generate(CONFIG, variables, TOKENS, MASK, max_new_tokens=N, kv_format=kv_format).tokens
    chunks = stream_tokens(CONFIG, variables, TOKENS, MASK, max_new_tokens=N, kv_format=kv_format, chunk=5)
    np.testing.assert_array_equal(np.concatenate(list(chunks), axis=1), tokens)
    if kv_format in (None, "float32"):
        np.testing.assert_array_equal(tokens, greedy)
        return
    logits = whole_text_logits(CONFIG, variables, np.concatenate([TOKENS, tokens], axis=1))
    logits = logits[:, TOKENS.shape[1] - 1 : -1]
    chosen = np.take_along_axis(logits, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    # Logits of size std(logits); keys and values are rounded by 2^-9 (bfloat16) or 1/254 of their largest channel.
    assert (logits.max(axis=-1) - chosen < 0.1 * np.std(logits)).all()


SAMPLED = SamplingConfig(temperature=1.2, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3)


def test_streaming_does_not_depend_on_chunks_and_is_reproducible_for_a_seed(
    variables: dict[str, Any],
) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": N, "sampling": SAMPLED}
    seeded = [
        np.asarray(generate(CONFIG, variables, TOKENS, MASK, key=jax.random.key(s), **arguments).tokens)
        for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(seeded[0], seeded[1])
    assert (seeded[0] != seeded[2]).any()
    for chunk in (1, 3, 100):
        chunks = list(
            stream_tokens(CONFIG, variables, TOKENS, MASK, key=jax.random.key(1), chunk=chunk, **arguments)
        )
        assert [c.shape[1] for c in chunks[:2]] == [1, min(chunk, N - 1)]
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), seeded[0])


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_the_repetition_penalty_covers_the_prompt_and_the_generated_text(
    variables: dict[str, Any], attention: str
) -> None:
    """Against the definition; also checks that both kinds of cache give the logits of the full text."""
    config = dataclasses.replace(CONFIG, attention=attention)
    sampling = SamplingConfig(repetition_penalty=2.0)
    tokens = np.asarray(generate(config, variables, TOKENS, MASK, max_new_tokens=N, sampling=sampling).tokens)
    assert len(np.unique(tokens)) > 5
    text = np.concatenate([TOKENS, tokens], axis=1)
    logits = whole_text_logits(config, variables, text)[:, TOKENS.shape[1] - 1 : -1]
    for row, prompt, row_logits in zip(tokens, PROMPTS, logits, strict=True):
        for i in range(N):
            seen = np.isin(np.arange(CONFIG.vocab_size), [*prompt, *row[:i]])
            damped = np.where(row_logits[i] > 0, row_logits[i] / 2, row_logits[i] * 2)
            assert row[i] == np.argmax(np.where(seen, damped, row_logits[i]))


def test_each_step_uses_a_new_key() -> None:
    """Equal logits at every step: a reused key would choose the same token every time."""
    sampling, key, logits = SamplingConfig(temperature=1.0), jax.random.key(0), jnp.zeros((3, 50))
    state = steps.empty_state(init_cache(CONFIG, 3, 8), seen=None, text=None)
    for _ in range(8):
        state = steps.choose(sampling.filters(), jnp.zeros(0, jnp.int32), state, logits, key)
    assert all(len(set(row)) > 4 for row in np.asarray(state.tokens).tolist())
    assert state.lengths.tolist() == [8, 8, 8]


def checked(variables: dict[str, Any], config: ModelConfig = CONFIG, **changes: Any) -> generation._Run:
    arguments: dict[str, Any] = {
        "tokens": TOKENS, "mask": MASK, "max_new_tokens": N, "sampling": SamplingConfig(), "key": None,
        "eos_ids": (), "kv_format": None, "prompt_lookup": 0,
    } | changes  # fmt: skip
    return generation._checked(config, variables, **arguments)


def test_other_lengths_end_tokens_and_sampling_values_do_not_recompile(
    variables: dict[str, Any], compilations: list[str]
) -> None:
    """Within a bucket, the sizes, all sampling values and the end tokens are arguments of the compiled programs."""

    def run(prompts: list[list[int]], new_tokens: int, eos: list[int], **numbers: float) -> None:
        tokens, mask = left_pad(prompts)
        sampling, key = SamplingConfig(top_k=4, **numbers), jax.random.key(1)
        arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "sampling": sampling, "key": key}
        generate(CONFIG, variables, tokens, mask, eos_ids=eos, **arguments)
        list(stream_tokens(CONFIG, variables, tokens, mask, eos_ids=eos, chunk=new_tokens, **arguments))

    run(PROMPTS, N, [1], temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    compilations.clear()
    for length in range(1, 17):
        prompts, eos = [[5] * length, [7], [3, 4][:length]], list(range(length % 8 + 1))
        run(prompts, 25 - length, eos, temperature=length / 3, top_p=length / 17, repetition_penalty=length)
    same = ModelConfig.from_dict(CONFIG.to_dict())
    generate(same, variables, TOKENS, MASK, max_new_tokens=N)
    compilations.clear()
    generate(same, variables, TOKENS[::-1], MASK[::-1], max_new_tokens=N - 1)
    assert not compilations


def with_exact_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables padding to buckets from here on."""
    for module, name in (
        (generation, "prompt_width"),
        (generation, "cache_capacity"),
        (steps, "cache_capacity"),
    ):
        monkeypatch.setattr(module, name, lambda config, size: size)
    monkeypatch.setattr(generation, "PROGRAMS", Programs())


def written(run: generation._Run) -> tuple[np.ndarray, list[np.ndarray]]:
    """The generated tokens and, for each row, the values cached by its layers, from which the logits are computed."""
    state = run.advance(run.grown(run.start()), N)
    lengths = np.broadcast_to(state.cache.length, len(run.tokens))
    rows = []
    for b, length in enumerate(lengths):
        for leaf in jax.tree.leaves(state.cache.layers):
            rows.append(np.asarray(leaf[b] if run.config.attention == "linear" else leaf[b, :length]))
    return np.asarray(state.tokens)[:, :N], rows


# 0: bit-identical. Else float32 rounding: XLA compiles the sines of rotary positions, and the sums of linear attention
# over the keys of a chunk, to different instructions for different sizes.
@pytest.mark.extended
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("attention", "kv_format", "position", "rounding"),
    [
        # slow: the cache of the third case with the positions of the second
        pytest.param("softmax", "float32", "learned", 0, marks=pytest.mark.slow),
        ("softmax", "int8", "learned", 0),
        ("softmax", "float32", "rope", 1e-6),
        ("linear", None, "learned", 1e-6),
    ],
)
def test_padding_to_buckets_changes_no_bit(
    attention: str, kv_format: str | None, position: str, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed model with the C++ attention kernel, which never reads the positions that buckets add."""
    config = dataclasses.replace(
        CONFIG, attention=attention, position=position, precision="bitnet_b158", max_length=90
    )
    variables = packing.pack(init(config)["params"], config)
    tokens, mask = left_pad([*PROMPTS, list(range(17))])  # 17 tokens: a width of 32, a cache of 64
    run = checked(variables, config, tokens=tokens, mask=mask, kv_format=kv_format)
    assert (run.tokens.shape, run.room) == ((4, 32), 64)
    got, got_rows = written(run)
    with_exact_sizes(monkeypatch)
    run = checked(variables, config, tokens=tokens, mask=mask, kv_format=kv_format)
    assert (run.tokens.shape, run.room) == ((4, 17), 30)
    expected, expected_rows = written(run)
    np.testing.assert_array_equal(got, expected)
    for row, other in zip(got_rows, expected_rows, strict=True):
        np.testing.assert_allclose(row, other, rtol=rounding, atol=rounding)


@pytest.mark.extended
@pytest.mark.optimized
@pytest.mark.parametrize(
    "attention", ["softmax", "linear", pytest.param("relu", marks=pytest.mark.slow)]
)  # slow: relu has the cache and the loops of softmax
def test_the_text_does_not_depend_on_batching_streaming_or_cache_size(
    attention: str, variables: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, attention=attention, max_length=300)
    tokens = np.asarray(generate(config, variables, TOKENS, MASK, max_new_tokens=N).tokens)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        longer = stream_tokens(config, variables, np.asarray([prompt]), max_new_tokens=80, chunk=40)
        np.testing.assert_array_equal(np.concatenate(list(longer), axis=1)[0, :N], row)


def test_a_prefill_computes_the_logits_of_one_position(variables: dict[str, Any]) -> None:
    run = checked(variables)
    program = jax.jit(partial(steps.prefill, CONFIG, None, False))
    lowered = program.lower(variables, run.filters, run.eos, run.tokens, run.lengths, run.key)
    compiled = lowered.compile().as_text()
    assert "f32[3,23]" in compiled
    assert "f32[3,16,23]" not in compiled
    assert "f32[48,23]" not in compiled


def test_streaming_donates_the_cache_and_not_the_weights(variables: dict[str, Any]) -> None:
    run = checked(variables, sampling=SAMPLED, key=jax.random.key(0))
    state = run.grown(run.start())
    after = run.advance(state, 3)
    assert state.cache.layers[0].k.is_deleted()
    assert int(after.step) == 3
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(variables))


def test_a_chunk_has_at_least_one_token(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="chunk: got 0"):
        stream_tokens(CONFIG, variables, TOKENS, MASK, max_new_tokens=1, chunk=0)


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "int8"])
def test_a_step_does_not_copy_the_cache(variables: dict[str, Any], kv_format: str, batch: int) -> None:
    config = dataclasses.replace(CONFIG, max_length=20_000)
    prompts: dict[str, Any] = {"tokens": TOKENS[:batch], "mask": MASK[:batch]}
    run = checked(variables, config, max_new_tokens=19_900, kv_format=kv_format, **prompts)
    state = jax.eval_shape(lambda: steps.with_room(run.room, run.start()))
    step = jax.jit(partial(steps.advance, config, 0), donate_argnums=3)
    compiled = step.lower(variables, run.filters, run.eos, state, run.key, 3).compile()
    one = state.cache.layers[0].k
    assert compiled.memory_analysis().temp_size_in_bytes < one.size * one.dtype.itemsize


def test_an_empty_cache() -> None:
    cache = init_cache(CONFIG, 3, 10, dtype="bfloat16")
    assert cache.layers[0].k.shape == cache.layers[0].v.shape == (3, 10, 1, 8)
    assert cache.layers[0].k.dtype == jnp.uint16  # its bits
    assert (cache.valid.shape, int(cache.length), bool(cache.valid.any())) == ((3, 10), 0, False)
    layer = init_cache(CONFIG, 3, 10, dtype="int8").layers[0]
    assert (layer.k.dtype, layer.v_scale.shape, layer.v_scale.dtype) == (jnp.int8, (3, 10, 1), jnp.float32)
    with pytest.raises(ValueError, match="'int4', expected one of float32, bfloat16, int8"):
        init_cache(CONFIG, 3, 10, dtype="int4")
    state = init_cache(dataclasses.replace(CONFIG, attention="linear"), 3, 10).layers[0]
    assert isinstance(state, LinearState)
    assert state.s.shape == (3, 2, 8, 8)
    with pytest.raises(ValueError, match="needs a causal language model, got causal=False"):
        init_cache(dataclasses.replace(CONFIG, causal=False), 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 36}, "prompt of 5 tokens and 36 new ones need 41 positions.*max_length=40"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"tokens": TOKENS.astype(np.float32)}, "tokens are float32"),
        ({"tokens": TOKENS[0]}, r"tokens are int32\[5\], expected integers .B, T."),
        ({"tokens": TOKENS[:, :0], "mask": MASK[:, :0]}, "T >= 1"),
        ({"tokens": TOKENS + 18}, r"lie in \[18, 27\], expected ids in \[0, 23\)"),
        ({"tokens": TOKENS - 1}, r"lie in \[-1, 8\]"),
        ({"mask": MASK[:2]}, r"mask is bool\[2, 5\], expected bool\[3, 5\]"),
        ({"mask": MASK.astype(np.int32)}, "mask is int32"),
        ({"mask": MASK[:, ::-1]}, "padding on the left"),
        ({"mask": MASK & False}, "padding on the left"),
        ({"sampling": SAMPLED}, "temperature=1.2 needs a key"),
        ({"kv_format": "int4"}, "kv_format: got 'int4', expected None or one of float32, bfloat16, int8"),
        ({"config": dataclasses.replace(CONFIG, causal=False)}, "needs a causal language model"),
    ],
)
def test_invalid_requests_are_rejected_before_any_computation(
    variables: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "config": CONFIG, "variables": {}, "tokens": TOKENS, "mask": MASK, "max_new_tokens": N,
    } | changes  # fmt: skip
    for function in (generate, stream_tokens):  # the first token of the stream is never requested here
        with pytest.raises(ValueError, match=message):
            function(**arguments)
