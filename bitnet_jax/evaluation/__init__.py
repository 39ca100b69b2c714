"""Evaluation: bits per byte and perplexity with n-gram baselines, task scores, and energy."""

from bitnet_jax.evaluation.language import (
    LanguageScore,
    evaluate,
    evaluate_text,
    model_logits,
    token_nats,
)
from bitnet_jax.evaluation.ngram import ngram_bits_per_byte, ngram_counts, ngram_nats

__all__ = [
    "LanguageScore",
    "evaluate",
    "evaluate_text",
    "model_logits",
    "ngram_bits_per_byte",
    "ngram_counts",
    "ngram_nats",
    "token_nats",
]
