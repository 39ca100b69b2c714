"""Language model evaluation on held-out text: nats per token, bits per byte, perplexity.

Every token of the stream after the first is predicted exactly once, in windows of the length the model was
trained with. A stream from `token_stream` begins with a separator (if the tokenizer has one), so every byte of the
text is predicted; without a separator the first token is not predicted and its bytes are not counted.

Bits per byte is the total number of bits, separators included, divided by the bytes of text, without separators:
the length of an ideal code for the documents and their ends, comparable across tokenizers. Bytes are counted in the
documents (see data/streams.py), so they do not depend on windows, strides and batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax.data.batches import consecutive_batches
from bitnet_jax.data.errors import DataError
from bitnet_jax.inference.limits import warn_beyond_training
from bitnet_jax.inference.programs import PROGRAMS
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.nn.placement import whole

Apply = Callable[[Any, Int[Array, "B T"]], Float[Array, "B T V"]]


@dataclass(frozen=True)
class LanguageScore:
    """Sums over a text; every metric is a ratio of them."""

    nats: float  # sum of -ln P(token | previous tokens)
    tokens: int  # predicted tokens
    text_bytes: int  # bytes these tokens stand for

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """exp(nats per token); inf on overflow."""
        return math.exp(self.nats_per_token) if not self.nats_per_token > 700 else math.inf

    def summary(self) -> dict[str, float | int]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
        }


def token_nats(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-ln softmax(logits)[target], in float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def _window_nats(
    apply: Apply,
    variables: Any,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
) -> Float[Array, " B"]:
    # Not a product: 0 * inf would be NaN for unscored targets with probability 0.
    return whole(jnp.sum(jnp.where(scored, token_nats(apply(variables, inputs), targets), 0.0), axis=-1))


def evaluate(
    apply: Apply,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
) -> LanguageScore:
    """Score a model over batches.

    Args:
      apply: (variables, tokens [B, T]) -> logits [B, T, V]; pure. Pass the same function every time: it is the
        cache key of the compiled program.
      variables: of `apply`, latent or packed.
      batches: {"inputs", "targets", "target_bytes"} [B, T], and optionally "scored" bool [B, T] (default: all
        True), as made by `consecutive_batches`.
    """
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        targets = batch["targets"]
        scored = batch.get("scored", np.ones(targets.shape, bool))
        # Summed over a window in float32, over windows in float64, to keep precision over thousands of windows.
        program = PROGRAMS.of(_window_nats, apply, shapes=targets.shape)
        window_nats = program(variables, batch["inputs"], targets, scored)
        nats += float(np.sum(np.asarray(window_nats), dtype=np.float64))
        tokens += int(scored.sum())
        text_bytes += int(batch["target_bytes"][scored].sum())
    if not tokens or not text_bytes:
        raise DataError(
            f"got {tokens} tokens and {text_bytes} bytes to predict, expected at least one each; use more text"
        )
    return LanguageScore(nats, tokens, text_bytes)


@functools.lru_cache(maxsize=64)
def model_logits(config: ModelConfig) -> Apply:
    """`Transformer(config)` as the `apply` of `evaluate`; cached, so that it is compiled once per config."""
    model = Transformer(config)

    def logits(variables: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        output: Any = model.apply(variables, tokens)
        return output.logits

    return logits


def evaluate_text(
    config: ModelConfig,
    variables: Any,
    tokens: np.ndarray,
    token_bytes: np.ndarray,
    *,
    length: int | None = None,
    batch_size: int = 16,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> LanguageScore:
    """Score a latent or packed Transformer on a token stream.

    Args:
      config: of the model.
      variables: {"params": ...} and, if packed, {"packed": ...}.
      tokens: int [N], usually `corpus.valid`.
      token_bytes: int [N], bytes of text that each token stands for, usually `corpus.valid_token_bytes`.
      length: window length T, default `config.known_length`, the training length; longer windows give a
        UserWarning. The first token of a window has no context.
      batch_size: windows per batch.
      stride: if below `length`, windows overlap and each scored token has at least length - stride tokens of
        context; default: length.
      max_tokens: score only the first `max_tokens` predictions.

    Raises:
      DataError: not a causal language model, a length or stride out of range, or nothing to predict.
    """
    length = config.known_length if length is None else length
    stride = length if stride is None else stride
    if config.num_classes or not config.causal:
        raise DataError("got a classifier or a bidirectional model, expected a causal language model")
    if length > config.max_length:
        raise DataError(f"length: got {length}, expected at most the model's max_length {config.max_length}")
    if length < 1 or not 1 <= stride <= length:
        raise DataError(
            f"got length {length} and stride {stride}, expected at least 1 and the stride at most the length"
        )
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens: got {max_tokens}, expected at least 1")
    part = slice(None if max_tokens is None else max_tokens + 1)
    tokens, token_bytes = tokens[part], token_bytes[part]
    if len(tokens) and int(tokens.max()) >= config.vocab_size:
        raise DataError(
            f"tokens: got the id {tokens.max()}, expected ids below the model's vocab_size {config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    warn_beyond_training(
        config, length, f"use a length of {config.known_length}, and a stride for more context"
    )
    batches = consecutive_batches(tokens, length, batch_size, stride, token_bytes)
    return evaluate(model_logits(config), variables, batches)
