"""Add-k n-gram models: the baseline that a neural model has to beat."""

from __future__ import annotations

import math

import numpy as np

from bitnet_jax.data.errors import DataError


def ngram_counts(tokens: np.ndarray, order: int = 3, vocab_size: int = 256) -> np.ndarray:
    """Counts of each n-gram of `order` tokens, int64 [V] * order. A byte trigram table takes 128 MiB."""
    return np.bincount(_ngram_index(tokens, order, vocab_size), minlength=vocab_size**order).reshape(
        (vocab_size,) * order
    )


def ngram_nats(counts: np.ndarray, tokens: np.ndarray, k: float = 0.1) -> np.ndarray:
    """-ln P of every token that has order - 1 tokens of context, float64 [N - order + 1].

        P(c | ab) = (count(abc) + k) / (count(ab) + k V)      count(ab) = sum over c of count(abc)

    Args:
      counts: of the training text, from `ngram_counts`; order and V are its rank and size.
      tokens: int [N].
      k: added to every count (Lidstone); 0.1 fits text better than Laplace's 1. With 0, unseen n-grams cost
        infinitely many nats.
    """
    order, vocab_size = counts.ndim, counts.shape[0]
    index = _ngram_index(tokens, order, vocab_size)
    seen = counts.reshape(-1)[index]
    context = counts.sum(axis=-1).reshape(-1)[index // vocab_size]
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log((seen + k) / (context + k * vocab_size))


def ngram_bits_per_byte(
    train: np.ndarray,
    valid: np.ndarray,
    valid_bytes: int,
    *,
    order: int = 3,
    vocab_size: int = 256,
    k: float = 0.1,
) -> float:
    """Bits per byte on `valid` of an add-k n-gram model fitted to `train`.

    The first order - 1 tokens of `valid` are context only. Separators cost bits but have no bytes, as in
    language.py: `valid_bytes` is `token_bytes[order - 1:].sum()` of the stream.
    """
    if valid_bytes < 1:
        raise DataError(f"valid_bytes: got {valid_bytes}, expected at least 1; hold out more text")
    nats = ngram_nats(ngram_counts(train, order, vocab_size), valid, k)
    return float(nats.sum() / math.log(2) / valid_bytes)


def _ngram_index(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """Every n-gram of `order` tokens as one number in base V, first token most significant."""
    count = len(tokens) - order + 1
    if order < 1 or count < 1:
        raise DataError(
            f"got {len(tokens)} tokens and order {order}, expected order >= 1 and at least `order` tokens"
        )
    if not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise DataError(
            f"got tokens {tokens.min()} to {tokens.max()}, expected 0 to {vocab_size - 1} (vocab_size)"
        )
    index = np.zeros(count, np.int64)
    for i in range(order):
        index = index * vocab_size + tokens[i : i + count]
    return index
