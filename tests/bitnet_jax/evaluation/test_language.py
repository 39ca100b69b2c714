"""Language model scores against known distributions and a plain loop, for latent and packed weights."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.data import (
    ByteTokenizer,
    CharTokenizer,
    DataError,
    Document,
    consecutive_batches,
    measured_stream,
)
from bitnet_jax.evaluation import (
    LanguageScore,
    evaluate,
    evaluate_text,
    model_logits,
    ngram_counts,
    ngram_nats,
    token_nats,
)
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing

TEXT = "Bits, and pieces: \u00e9 \U0001f600.\n" * 6
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    ffn_size=48,
    max_length=16,
    precision="bitnet_b158",
)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.concatenate([[0], ByteTokenizer().encode(TEXT), [0]]).astype(np.int32)


@pytest.fixture(scope="module")
def latent() -> dict[str, object]:
    init = jax.jit(Transformer(CONFIG).init)
    return {"params": init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]}


def sizes(tokens: np.ndarray) -> np.ndarray:
    """The number of bytes of each token of a byte stream."""
    return (tokens != 0).astype(np.int32)


def uniform(variables: object, tokens: jax.Array) -> jax.Array:
    return jnp.zeros((*tokens.shape, 256), jnp.float32)


def test_a_uniform_model_costs_eight_bits_per_byte_and_separator(tokens: np.ndarray) -> None:
    score = evaluate(uniform, {}, consecutive_batches(tokens, 16, 4, None, sizes(tokens)))
    text_bytes = len(TEXT.encode())
    assert (score.tokens, score.text_bytes) == (
        text_bytes + 1,
        text_bytes,
    )  # the last separator is predicted as well
    # float32 logs, summed over 16 in float32 and then in float64
    assert score.nats_per_token == pytest.approx(math.log(256), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(8 * (text_bytes + 1) / text_bytes, rel=1e-6)
    assert score.perplexity == pytest.approx(256, rel=1e-5)
    assert score.summary() == {
        "bits_per_byte": score.bits_per_byte,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "tokens": score.tokens,
        "text_bytes": score.text_bytes,
    }


def test_bits_per_byte_counts_bytes_of_the_text_and_not_tokens() -> None:
    tokenizer = CharTokenizer.fit([TEXT])
    ids, token_bytes = measured_stream([Document("a", TEXT)], tokenizer)

    def uniform_characters(variables: object, tokens: jax.Array) -> jax.Array:
        return jnp.zeros((*tokens.shape, tokenizer.vocab_size), jnp.float32)

    score = evaluate(uniform_characters, {}, consecutive_batches(ids, 16, 4, None, token_bytes))
    assert (score.tokens, score.text_bytes) == (
        len(TEXT) - 1,
        len(TEXT.encode()) - 1,
    )  # the first one is not predicted
    bits = math.log2(tokenizer.vocab_size) * (len(TEXT) - 1) / (len(TEXT.encode()) - 1)
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 5), (7, None), (200, 1)])
def test_a_bigram_model_scores_the_same_for_any_windows(
    tokens: np.ndarray, length: int, stride: int | None
) -> None:
    """It looks one token back, so windows must not matter; ngram.py gives the expected sum."""
    counts = ngram_counts(tokens, order=2)
    table = jnp.log(jnp.asarray((counts + 0.1) / (counts.sum(1, keepdims=True) + 25.6), jnp.float32))

    def bigram(variables: jax.Array, tokens: jax.Array) -> jax.Array:
        return variables[tokens]

    score = evaluate(bigram, table, consecutive_batches(tokens, length, 3, stride, sizes(tokens)))
    assert score.nats == pytest.approx(ngram_nats(counts, tokens, 0.1).sum(), rel=1e-6)


def test_unscored_tokens_may_have_probability_zero() -> None:
    """log P = -inf at padding must not affect the sum."""
    logits = jnp.where(jnp.arange(4) == 0, -jnp.inf, 0.0)

    def never_zero(variables: object, tokens: jax.Array) -> jax.Array:
        return jnp.broadcast_to(logits, (*tokens.shape, 4))

    batches = consecutive_batches(np.array([1, 2, 3]), 4, 2, None, np.ones(3, int))
    score = evaluate(never_zero, {}, batches)
    assert score.nats_per_token == pytest.approx(math.log(3), rel=1e-6)


def test_token_nats_is_the_negative_log_probability() -> None:
    logits = jnp.array([[2.0, 0.0, -1.0], [500.0, 0.0, 0.0]], jnp.bfloat16)
    total = math.exp(2) + 1 + math.exp(-1)
    expected = [math.log(total) + 1, 500.0]
    actual = token_nats(logits, jnp.array([2, 1]))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("stride", [None, 4])
def test_transformer_scores_match_a_plain_loop(
    tokens: np.ndarray, latent: dict[str, object], stride: int | None
) -> None:
    score = evaluate_text(CONFIG, latent, tokens, sizes(tokens), batch_size=4, stride=stride)
    apply, nats, scored_up_to = jax.jit(model_logits(CONFIG)), 0.0, 0
    for start in range(0, len(tokens) - 1, stride or 16):
        inputs, targets = tokens[start : start + 16], tokens[start + 1 : start + 17]
        row = np.zeros((1, 16), np.int32)
        row[0, : len(inputs)] = inputs
        log_p = jax.nn.log_softmax(apply(latent, row)[0], axis=-1)
        for i, target in enumerate(targets):
            if start + 1 + i > scored_up_to:
                nats -= float(log_p[i, target])
                scored_up_to += 1
    assert scored_up_to == len(tokens) - 1 == score.tokens
    # batches of 1 and 4 may sum in a different order: 1e-6 relative in the logits, halved by averaging
    assert score.nats == pytest.approx(nats, rel=1e-5)


def test_packed_weights_score_like_latent_weights(tokens: np.ndarray, latent: dict[str, object]) -> None:
    packed = packing.pack(latent["params"], CONFIG)
    assert packed["packed"]
    scores = [evaluate_text(CONFIG, v, tokens, sizes(tokens), batch_size=4) for v in (latent, packed)]
    # integer sums are bit-identical; the operations around them may be fused differently
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=1e-6)
    assert scores[0].tokens == scores[1].tokens


def test_scoring_part_of_the_text(tokens: np.ndarray, latent: dict[str, object]) -> None:
    part = evaluate_text(CONFIG, latent, tokens, sizes(tokens), batch_size=4, max_tokens=50)
    whole = evaluate_text(CONFIG, latent, tokens[:51], sizes(tokens)[:51], batch_size=4)
    assert part == whole
    assert part.tokens == 50


def test_windows_default_to_the_training_length_and_longer_ones_warn(
    tokens: np.ndarray, latent: dict[str, object]
) -> None:
    trained = dataclasses.replace(CONFIG, trained_length=8)

    def scored(config: ModelConfig, length: int | None = None) -> LanguageScore:
        return evaluate_text(config, latent, tokens, sizes(tokens), length=length)

    assert scored(trained) == scored(trained, 8) == scored(CONFIG, 8)
    with pytest.warns(
        UserWarning, match="sequences of 16 tokens, the model was trained with 8: .*length of 8"
    ):
        beyond = scored(trained, 16)
    assert beyond == scored(CONFIG) != scored(trained)


def test_the_program_is_compiled_once(tokens: np.ndarray, latent: dict[str, object]) -> None:
    traced = []

    def counting(variables: object, tokens: jax.Array) -> jax.Array:
        traced.append(tokens.shape)
        return uniform(variables, tokens)

    for _ in range(2):
        evaluate(counting, {}, consecutive_batches(tokens, 16, 4, None, sizes(tokens)))
    assert traced == [(4, 16)]
    assert model_logits(CONFIG) is model_logits(ModelConfig.from_dict(CONFIG.to_dict()))


def test_extreme_logits() -> None:
    assert LanguageScore(1e6, 10, 10).perplexity == math.inf
    assert math.isnan(LanguageScore(math.nan, 10, 10).perplexity)


def test_invalid_evaluations_are_rejected(tokens: np.ndarray, latent: dict[str, object]) -> None:
    token_bytes = sizes(tokens)
    with pytest.raises(DataError, match="length: got 17, expected at most the model's max_length 16"):
        evaluate_text(CONFIG, latent, tokens, token_bytes, length=17)
    for length, stride in ((0, None), (-1, None), (8, 0), (8, 9)):
        with pytest.raises(DataError, match=f"length {length} and stride"):
            evaluate_text(CONFIG, latent, tokens, token_bytes, length=length, stride=stride)
    with pytest.raises(DataError, match="max_tokens: got -3, expected at least 1"):
        evaluate_text(CONFIG, latent, tokens, token_bytes, max_tokens=-3)
    with pytest.raises(DataError, match="got 1 tokens, expected at least 2|text of 1 tokens"):
        evaluate_text(CONFIG, latent, tokens[:1], token_bytes[:1])
    fields = CONFIG.to_dict()
    with pytest.raises(DataError, match="vocab_size 100"):
        evaluate_text(ModelConfig.from_dict(fields | {"vocab_size": 100}), latent, tokens, token_bytes)
    with pytest.raises(DataError, match="classifier"):
        evaluate_text(ModelConfig.from_dict(fields | {"num_classes": 2}), latent, tokens, token_bytes)
    with pytest.raises(DataError, match="0 tokens and 0 bytes"):
        evaluate(uniform, {}, [])
