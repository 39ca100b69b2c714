"""Batched likelihoods of texts against one text at a time, and against logits of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from bitnet_jax.data import ByteTokenizer, CharTokenizer, DataError
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.evaluation import likelihood
from bitnet_jax.evaluation.language import evaluate_text, model_logits
from bitnet_jax.evaluation.likelihood import (
    Request,
    TextModel,
    score_requests,
    score_texts,
    text_request,
)
from bitnet_jax.interop import huggingface
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=48, max_length=48
)
CASES = [
    ("", "A sentence."),
    ("Question: what?\nAnswer:", " this"),
    ("Question: what?\nAnswer:", " that, a longer one"),
]


@pytest.fixture(scope="module")
def model() -> TextModel:
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(
        lambda x: 8 * x if x.ndim == 2 else x, params
    )  # so that tokens have different likelihoods
    return TextModel(CONFIG, {"params": params}, ByteTokenizer())


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # each shape is used once
def logits(variables: Any, tokens: jax.Array) -> jax.Array:
    return model_logits(CONFIG)(variables, tokens[None])[0]


def by_itself(model: TextModel, tokens: np.ndarray, scored_from: int) -> float:
    """ln P of the tokens from `scored_from` on, from one unpadded forward pass."""
    log_p = log_softmax(
        np.asarray(logits(model.variables, jnp.asarray(tokens, jnp.int32)), np.float64), axis=-1
    )
    return float(sum(log_p[i - 1, tokens[i]] for i in range(scored_from, len(tokens))))


def test_batched_scores_equal_scores_of_single_texts(model: TextModel) -> None:
    scores = score_texts(model, CASES)
    for (context, continuation), score in zip(CASES, scores, strict=True):
        tokens = np.frombuffer(f"\0{context}{continuation}".encode(), np.uint8)
        expected = by_itself(model, tokens, 1 + len(context))
        # Other shapes sum in a different order: 1e-6 relative error per logit.
        assert score.log_probability == pytest.approx(expected, rel=1e-5)
        assert score.tokens == len(continuation)
    assert score_texts(model, CASES) == scores
    order = [2, 0, 1]
    assert score_texts(model, [CASES[i] for i in order]) == [scores[i] for i in order]
    alone = [score_texts(model, [case])[0].log_probability for case in CASES]
    assert alone == pytest.approx([score.log_probability for score in scores], rel=1e-6)


@pytest.mark.extended
def test_greedy_marks_the_most_likely_continuation(model: TextModel) -> None:
    tokens = np.array([0, 65, 66])
    for _ in range(4):
        tokens = np.append(tokens, int(jnp.argmax(logits(model.variables, jnp.asarray(tokens))[-1])))
    other = tokens.copy()
    other[4] = (other[4] + 1) % 256
    assert [s.greedy for s in score_requests(model, [Request(tokens, 3), Request(other, 3)])] == [True, False]


def test_packed_and_latent_models_have_equal_scores(model: TextModel) -> None:
    packed = model._replace(variables=packing.pack(model.variables["params"], CONFIG))
    for a, b in zip(score_texts(model, CASES), score_texts(packed, CASES), strict=True):
        assert a.log_probability == pytest.approx(b.log_probability, rel=1e-6)


def test_long_texts_are_scored_in_windows(model: TextModel) -> None:
    """Every token once; a window has as much context as fits."""
    text = np.random.default_rng(0).integers(1, 256, 130)
    whole = score_requests(model, [Request(text, 1)])[0]
    assert whole.tokens == 129
    # Windows of 48 inputs: tokens 1 to 48, 49 to 96, and the last 33 with as much context as fits.
    pieces = [(text[:49], 1), (text[48:97], 1), (text[81:], 16)]
    assert whole.log_probability == pytest.approx(sum(by_itself(model, *p) for p in pieces), rel=1e-5)
    last = score_requests(model, [Request(text, 125)])[0]
    assert last.log_probability == pytest.approx(by_itself(model, text[-49:], 44), rel=1e-5)


def test_texts_beyond_the_trained_length_are_scored_with_a_warning(model: TextModel) -> None:
    short = model._replace(config=dataclasses.replace(CONFIG, trained_length=20))
    assert score_texts(short, [("a", "b" * 18)]) == score_texts(model, [("a", "b" * 18)])
    with pytest.warns(UserWarning, match="sequences of 30 tokens, the model was trained with 20") as caught:
        scores = score_texts(short, [("a", "b" * 29), ("a", "b" * 25)])
    assert len(caught) == 1
    assert scores == score_texts(model, [("a", "b" * 29), ("a", "b" * 25)])


def test_bits_per_byte_follows_from_the_same_likelihoods(model: TextModel) -> None:
    tokens = np.random.default_rng(1).integers(1, 256, 49).astype(np.int32)
    language = evaluate_text(CONFIG, model.variables, tokens, np.ones(len(tokens), int))
    score = score_requests(model, [Request(tokens, 1)])[0]
    assert score.log_probability == pytest.approx(-language.nats, rel=1e-6)
    assert score.tokens == language.tokens


def test_few_shapes_are_compiled(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def counting(variables: Any, tokens: jax.Array) -> jax.Array:
        shapes.append(tokens.shape)
        return jnp.zeros((*tokens.shape, 256), jnp.float32)

    monkeypatch.setattr(likelihood, "model_logits", lambda config: counting)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 64)
    requests = [Request(np.ones(n, int), 1) for n in range(2, 40)]
    scores = score_requests(model, requests)
    assert shapes == [(2, 32), (1, 48)]
    assert [score.tokens for score in scores] == list(range(1, 39))
    for score in scores:
        assert score.log_probability == pytest.approx(-score.tokens * np.log(256), rel=1e-6)


def test_spaces_between_context_and_continuation_belong_to_the_continuation(model: TextModel) -> None:
    for context, continuation in (("a b:", " c"), ("a b: ", "c")):
        request = text_request(model, context, continuation)
        assert bytes(request.tokens.astype(np.uint8)) == b"\0a b: c"
        assert request.scored_from == 5


def test_a_text_begins_with_the_separator_of_a_model_trained_here(model: TextModel) -> None:
    assert (model.begin, model.end) == ((0,), (0,))
    without = model._replace(tokenizer=CharTokenizer("abc "))
    assert (without.begin, without.end) == ((), ())
    request = text_request(without, "", "abc")  # the first one is not scored
    assert (request.tokens.tolist(), request.scored_from) == ([0, 1, 2], 1)
    with pytest.raises(DataError, match="expected it to have at least one token after another"):
        text_request(without, "", "a")
    with pytest.raises(DataError, match="got the continuation ''"):
        text_request(model, "a", "")


def test_a_text_begins_with_the_begin_tokens_that_a_model_states(model: TextModel) -> None:
    """Not with a token whose name is known, nor with a separator."""
    for begin in ((), (7,), (7, 8)):
        stated = model._replace(conversation=Conversation(begin=begin, end=(9,)))
        request = text_request(stated, "a", "b")
        assert (request.tokens.tolist(), request.scored_from) == ([*begin, 97, 98], len(begin) + 1)


def test_models_that_cannot_score_are_rejected(model: TextModel) -> None:
    for config, message in (
        (dataclasses.replace(CONFIG, num_classes=2), "got a classifier"),
        (dataclasses.replace(CONFIG, causal=False), "bidirectional model"),
    ):
        with pytest.raises(DataError, match=message):
            score_texts(model._replace(config=config), CASES)
    for request in (Request(np.ones(3, int), 3), Request(np.ones(3, int), 0)):
        with pytest.raises(DataError, match="request 0"):
            score_requests(model, [request])


def test_a_tokenizer_larger_than_the_vocabulary_can_score(model: TextModel) -> None:
    larger = CharTokenizer("".join(map(chr, range(257))), separator="\0")  # bytes and one extra symbol
    with pytest.warns(UserWarning, match="the tokenizer has 257 tokens, the model 256: .* is refused"):
        assert score_texts(model._replace(tokenizer=larger), CASES) == score_texts(model, CASES)
    with (
        pytest.warns(UserWarning, match="257 tokens"),
        pytest.raises(
            DataError, match="request 1: got the token 'Ā' with the id 256, expected ids below 256"
        ),
    ):
        score_texts(model._replace(tokenizer=larger), [("a", "b"), ("a", "Ā")])


@pytest.mark.extended
@pytest.mark.parametrize("name", ["bitnet_online_bf16_gqa20x5", "bitnet_autobit_packed_fp32_untied"])
def test_likelihoods_match_hugging_face_transformers(name: str, oracles: Path) -> None:
    """Teacher-forced sums from the logits of another library, for contexts of every length."""
    folder = oracles / "hf_bitnet" / name
    config, variables = huggingface.load(folder, dtype="float32")
    with np.load(folder / "oracle.npz") as oracle:
        ids, log_p = oracle["input_ids"], log_softmax(oracle["fp32/logits"].astype(np.float64), axis=-1)

    class Ids:
        kind, vocab_size, eos_id = "byte", config.vocab_size, None

    model = TextModel(config, variables, Ids())  # type: ignore[arg-type]
    requests = [Request(row, begin) for row in ids for begin in range(1, len(row))]
    expected = [
        sum(log_p[i, t - 1, row[t]] for t in range(begin, len(row)))
        for i, row in enumerate(ids)
        for begin in range(1, len(row))
    ]
    got = [score.log_probability for score in score_requests(model, requests)]
    # 1e-3 per logit, as for the logits themselves, times the maximum number of tokens.
    np.testing.assert_allclose(got, expected, atol=1e-3 * ids.shape[1])
