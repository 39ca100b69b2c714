"""n-gram baselines against a dictionary implementation and published figures."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import DataError, load_corpus
from bitnet_jax.evaluation import ngram_bits_per_byte, ngram_counts, ngram_nats


def naive_nats(train: list[int], valid: list[int], order: int, vocab_size: int, k: float) -> list[float]:
    """A literal implementation of the formula."""
    runs = Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))
    contexts = Counter()
    for run, count in runs.items():
        contexts[run[:-1]] += count
    costs = []
    for i in range(len(valid) - order + 1):
        run = tuple(valid[i : i + order])
        costs.append(-math.log((runs[run] + k) / (contexts[run[:-1]] + k * vocab_size)))
    return costs


@pytest.mark.parametrize(("order", "vocab_size", "k"), [(3, 256, 0.1), (3, 7, 0.1), (2, 7, 1.0), (1, 7, 0.5)])
def test_matches_a_dictionary_implementation(order: int, vocab_size: int, k: float) -> None:
    rng = np.random.default_rng(0)
    train = (rng.integers(0, min(vocab_size, 9), 3000) ** 2 % vocab_size).astype(np.int32)
    valid = rng.integers(0, vocab_size, 500).astype(np.int32)
    expected = naive_nats(train.tolist(), valid.tolist(), order, vocab_size, k)
    actual = ngram_nats(ngram_counts(train, order, vocab_size), valid, k)
    np.testing.assert_allclose(actual, expected, rtol=1e-13)  # the same float64 divisions and one log
    bits = ngram_bits_per_byte(train, valid, 77, order=order, vocab_size=vocab_size, k=k)
    assert bits == pytest.approx(sum(expected) / math.log(2) / 77, rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    counts = ngram_counts(np.array([0, 1, 2, 0, 1, 1, 2, 2]), order=3, vocab_size=3)
    for a in range(3):
        for b in range(3):
            nats = [ngram_nats(counts, np.array([a, b, c]))[0] for c in range(3)]
            assert np.exp(-np.array(nats)).sum() == pytest.approx(1, rel=1e-14)


def test_unseen_ngrams_without_smoothing_cost_infinity() -> None:
    counts = ngram_counts(np.array([0, 1, 0, 1]), order=2, vocab_size=2)
    np.testing.assert_array_equal(ngram_nats(counts, np.array([0, 1, 1]), k=0), [0, np.inf])


def test_published_baselines_of_tiny_shakespeare(data_root: Path) -> None:
    corpus = load_corpus(
        "lm/tinyshakespeare.txt.gz", tokenizer="char", split="tail", valid_fraction=0.1, root=data_root
    )
    for order, k, published in ((1, 0.0, 3.347), (2, 1.0, 2.482), (3, 0.1, 2.046)):
        nats = ngram_nats(ngram_counts(corpus.train, order, 65), corpus.valid, k).mean()
        assert nats == pytest.approx(published, abs=0.0005)  # published to three decimals


def test_invalid_input_is_rejected() -> None:
    with pytest.raises(DataError, match="got 2 tokens and order 3"):
        ngram_counts(np.array([1, 2]))
    with pytest.raises(DataError, match="got 3 tokens and order 0"):
        ngram_counts(np.array([1, 2, 3]), order=0)
    for wrong in (-1, 5):
        with pytest.raises(DataError, match="expected 0 to 4"):
            ngram_counts(np.array([1, 2, wrong]), vocab_size=5)
    with pytest.raises(DataError, match="valid_bytes: got 0"):
        ngram_bits_per_byte(np.arange(5), np.arange(5), 0)
