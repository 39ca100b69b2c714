"""Floating-point operations of training a Transformer, counted from its config."""

from __future__ import annotations

from bitnet_jax.data import Tokenizer
from bitnet_jax.models import ModelConfig
from bitnet_jax.training.config import RunConfig


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """Operations of an update per token of a text of `length` tokens, forward and backward.

        6 * (sum of n * k over the linear layers [n, k], the output head included)
        + 12 * layers * heads * head size * (keys that a query sees on average)

    A product of a vector and a matrix is n * k multiplications and as many additions, and both gradients cost as much
    again each (2001.08361, section 2.1); scores and mixed values are two such products with the keys (2204.02311,
    appendix B, which counts all `length` keys; here a causal query sees (length + 1) / 2, fewer in a window, and linear
    attention multiplies with a state of head-size rows). A classifier's head is applied once per text.

    Not counted: norms, softmax, quantizers, embeddings, and what is computed twice to save memory, so that a share of
    the peak is model FLOPs utilization. A product of codes counts like one of floats.
    """
    products = sum(
        n * k / (length if path == "classifier" else 1) for path, (n, k) in config.linear_shapes().items()
    )
    if config.head_is_table:
        products += config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_size * _keys(config, length)
    return 6 * products + 12 * attention


def run_flops_per_token(config: RunConfig, tokenizer: Tokenizer | None) -> float | None:
    """Of the model and the sequences of a run. None for images, whose layers are applied to parts of an image, and for
    an adapter, whose model has no gradients of its weights."""
    if tokenizer is None or config.adapter.rank is not None:
        return None
    return training_flops_per_token(config.model_config(tokenizer.vocab_size), config.data.length)


def _keys(config: ModelConfig, length: int) -> float:
    if config.attention == "linear":
        return config.head_size
    if not config.causal:
        return length
    window = min(config.sliding_window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
