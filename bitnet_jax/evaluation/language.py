"""How well a language model predicts a held-out text: nats per token, bits per byte, perplexity.

Every token of the stream after the first is predicted exactly once, in windows of the length the model was
trained with. A stream from `token_stream` begins with a separator (where the tokenizer has one), so every
byte of the text is among the predicted; without a separator the first token is given and its bytes are not
counted.

Bits per byte divide all the bits, separators included, by the bytes of text, in which a separator counts
nothing: the figure is the length of an ideal code for the documents and their ends, and compares across
tokenizers. Bytes are those of the documents (data/streams.py says which ones a token stands for), so windows,
strides and batches do not change them.
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

Apply = Callable[[Any, Int[Array, "B T"]], Float[Array, "B T V"]]


@dataclass(frozen=True)
class LanguageScore:
    """Sums over a text; every figure is a ratio of them."""

    nats: float  # sum of -ln P(token | tokens before)
    tokens: int  # predicted
    text_bytes: int  # that these tokens stand for

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """exp(nats per token); inf where that is beyond a float."""
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
    # Not a product: 0 * inf would be NaN where a target that is not scored is impossible.
    return jnp.sum(jnp.where(scored, token_nats(apply(variables, inputs), targets), 0.0), axis=-1)


def evaluate(
    apply: Apply,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
) -> LanguageScore:
    """Score a model over batches.

    Args:
      apply: (variables, tokens [B, T]) -> logits [B, T, V]; pure. Pass the same function every time: it is
        the key under which the compiled program is found again.
      variables: whatever `apply` takes, latent or packed.
      batches: {"inputs", "targets", "target_bytes"} [B, T], and optionally "scored" bool [B, T] (default: all
        are), as `consecutive_batches` makes them.
    """
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        targets = batch["targets"]
        scored = batch.get("scored", np.ones(targets.shape, bool))
        # Summed over a window in float32, over windows in float64: thousands of windows lose nothing.
        program = PROGRAMS.of(_window_nats, apply, shapes=targets.shape)
        window_nats = program(variables, batch["inputs"], targets, scored)
        nats += float(np.sum(np.asarray(window_nats), dtype=np.float64))
        tokens += int(scored.sum())
        text_bytes += int(batch["target_bytes"][scored].sum())
    if not tokens or not text_bytes:
        raise DataError(
            f"got {tokens} tokens and {text_bytes} bytes to predict, expected some; use more text"
        )
    return LanguageScore(nats, tokens, text_bytes)


@functools.lru_cache(maxsize=64)
def model_logits(config: ModelConfig) -> Apply:
    """`Transformer(config)` as `evaluate` takes it: one function per config, hence one compilation."""
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
    """Score a Transformer, latent or packed, on a token stream.

    Args:
      config: of the model.
      variables: {"params": ...} and, packed, {"packed": ...}.
      tokens: int [N], usually `corpus.valid`.
      token_bytes: int [N], bytes of text that each stands for, usually `corpus.valid_token_bytes`.
      length: T of a window, default `config.known_length`: what the model was trained with. The first token of a
        window sees nothing before it. A UserWarning where it is beyond what the model was trained with.
      batch_size: windows at a time.
      stride: below `length` windows overlap and every token has length - stride tokens in front; default: length.
      max_tokens: look at so many predictions from the start only.

    Raises:
      DataError: no causal language model, a length or stride out of range, or nothing to predict.
    """
    length = config.known_length if length is None else length
    stride = length if stride is None else stride
    if config.num_classes or not config.causal:
        raise DataError(
            "got a classifier or a model that sees later tokens, expected a causal language model"
        )
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
