"""ln P(continuation | context) of many texts, in padded batches.

A text is scored in windows of at most the model's length, right-padded (which a causal model ignores) to one of the
widths of batching.py. Up to rounding, a score does not depend on the other texts in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax.data.conversation import Conversation, of_documents, with_begin
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.evaluation.batching import BATCH_TOKENS, batches
from bitnet_jax.evaluation.language import Apply, model_logits, token_nats
from bitnet_jax.inference.limits import check_tokens, warn_beyond_training, warn_of_unknown_tokens
from bitnet_jax.inference.programs import PROGRAMS
from bitnet_jax.models import ModelConfig

BATCH_LOGITS = 2**25  # maximum logits per batch: 128 MiB


class TextModel(NamedTuple):
    """A causal language model with its tokenizer."""

    config: ModelConfig
    variables: Mapping[str, Any]
    tokenizer: Tokenizer
    conversation: Conversation | None = None  # None: of_documents(tokenizer), as for a model trained here

    @property
    def begin(self) -> tuple[int, ...]:
        """Ids before the first token of a text."""
        return self.stated.begin

    @property
    def end(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.stated.end

    @property
    def stated(self) -> Conversation:
        """What the model says about its texts."""
        return of_documents(self.tokenizer) if self.conversation is None else self.conversation


class Score(NamedTuple):
    log_probability: float  # natural logarithm, summed over the scored tokens
    tokens: int  # number of scored tokens
    greedy: bool  # whether every scored token is the most likely one at its position


class Request(NamedTuple):
    """A token sequence whose tokens from index `scored_from` on are scored."""

    tokens: np.ndarray  # int [N]
    scored_from: int  # at least 1: the first token has no context


def check_text_model(model: TextModel) -> None:
    """Raise DataError unless it is a causal language model; warn if the tokenizer has more tokens than the model."""
    config = model.config
    if config.num_classes or not config.causal:
        raise DataError("got a classifier or a bidirectional model, expected a causal language model")
    warn_of_unknown_tokens(config, model.tokenizer)


def text_request(model: TextModel, context: str, continuation: str) -> Request:
    """The request for ln P(continuation | context), after the begin tokens of the model.

    Trailing whitespace of the context belongs to the continuation, since most vocabularies join it to the next word;
    both are encoded as one text and split at the token length of the stripped context.

    Raises:
      DataError: there is nothing to score, or no context for it.
    """
    stripped = context.rstrip()
    tokens = with_begin(model.begin, model.tokenizer.encode(context + continuation))
    boundary = len(model.begin) + (len(model.tokenizer.encode(stripped)) if stripped else 0)
    if boundary == 0:  # without begin tokens and context the first token cannot be predicted
        boundary = 1
    if boundary >= len(tokens):
        raise DataError(
            f"got the continuation {continuation[:60]!r} of {context[-60:]!r}, expected it to have at least one token "
            "after another token"
        )
    return Request(tokens, boundary)


def score_texts(model: TextModel, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> list[Score]:
    """The scores of (context, continuation) pairs, see `text_request`."""
    requests = [text_request(model, context, continuation) for context, continuation in pairs]
    return score_requests(model, requests, progress=progress)


class _Window(NamedTuple):
    request: int
    inputs: np.ndarray  # int [n]
    targets: np.ndarray  # int [n]
    scored: int  # number of scored targets, at the end


def _windows(requests: Sequence[Request], length: int) -> Iterator[_Window]:
    """All scored tokens in windows of at most `length` inputs, with as much context as fits."""
    for i, (tokens, begin) in enumerate(requests):
        if not 1 <= begin < len(tokens):
            raise DataError(
                f"request {i}: got {len(tokens)} tokens scored from index {begin}, expected at least one token before "
                "it and one to score"
            )
        while begin < len(tokens):
            end = min(len(tokens), begin + length)
            start = max(0, end - 1 - length)
            yield _Window(i, tokens[start : end - 1], tokens[start + 1 : end], end - begin)
            begin = end


def score_requests(model: TextModel, requests: Sequence[Request], *, progress: bool = False) -> list[Score]:
    """The score of each request, in order.

    Raises:
      DataError: not a causal language model, or a request has nothing to score or a token outside the model's
        vocabulary.
    """
    check_text_model(model)
    for i, request in enumerate(requests):
        check_tokens(model.config, model.tokenizer, request.tokens, f"request {i}")
    length = model.config.max_length
    windows = list(_windows(requests, length))
    sizes = np.array([len(window.inputs) for window in windows])
    warn_beyond_training(model.config, int(sizes.max(initial=0)), "measure shorter texts")
    sums, counts, greedy = np.zeros(len(requests)), np.zeros(len(requests), int), np.ones(len(requests), bool)
    apply = model_logits(model.config)
    rows_of = functools.partial(batch_size, vocab_size=model.config.vocab_size)
    for texts, rows, width in batches(sizes, length, rows_of, progress=progress):
        batch = [windows[i] for i in texts]
        nats, hits = _scored_batch(apply, model.variables, batch, rows, width)
        for window, row_nats, row_hits in zip(batch, nats, hits, strict=False):
            scored = slice(len(window.targets) - window.scored, len(window.targets))
            sums[window.request] -= row_nats[scored].sum(dtype=np.float64)
            counts[window.request] += window.scored
            greedy[window.request] &= row_hits[scored].all()
    return [Score(*values) for values in zip(sums.tolist(), counts.tolist(), greedy.tolist(), strict=True)]


def batch_size(width: int, vocab_size: int) -> int:
    """Rows per batch that keep its logits within BATCH_LOGITS; 0 if a single row exceeds it."""
    return min(BATCH_TOKENS, BATCH_LOGITS // vocab_size) // width


def _scored_batch(
    apply: Apply, variables: Any, batch: Sequence[_Window], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, window in enumerate(batch):
        inputs[row, : len(window.inputs)] = window.inputs
        targets[row, : len(window.targets)] = window.targets
    nats, hits = PROGRAMS.of(_token_scores, apply, shapes=inputs.shape)(variables, inputs, targets)
    return np.asarray(nats), np.asarray(hits)


def _token_scores(
    apply: Apply, variables: Any, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """-ln P of each target, and whether it is the most likely token."""
    logits = apply(variables, inputs)
    return token_nats(logits, targets), jnp.argmax(logits, axis=-1).astype(jnp.int32) == targets
