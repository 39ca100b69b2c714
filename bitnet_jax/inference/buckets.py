"""Bucket sizes that prompts and caches are padded to, so that few programs serve all lengths.

    prompt_width    16, 32, ..., 128, then four sizes per octave: at most a quarter of the prompt is padding
    cache_capacity      64, 128, 192, 256, then two sizes per octave: at most a third of the cache is never written

Both are capped at the model's max_length, so the number of sizes is logarithmic in it. `padded_rows` fills a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitnet_jax.models import ModelConfig


def bucket(size: int, smallest: int, parts: int) -> int:
    """The next multiple of `smallest`, or of 2^k / parts for sizes in (2^k, 2^(k+1)] where that is coarser."""
    octave = 1 << max(size - 1, 1).bit_length() - 1  # the largest power of two below size
    step = max(smallest, octave // parts)
    return -(-size // step) * step


def prompt_width(config: ModelConfig, tokens: int) -> int:
    """The padded length of a prompt of `tokens` tokens."""
    return min(bucket(tokens, smallest=16, parts=4), config.max_length)


def cache_capacity(config: ModelConfig, positions: int) -> int:
    """The capacity of a cache that must hold `positions`; at least `prompt_width`."""
    return min(bucket(positions, smallest=64, parts=2), config.max_length)


def padded_rows(rows: Sequence[np.ndarray], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token sequences as int32 [count, width], and the mask of their tokens.

    Rows beyond the sequences have one token: a mean over none is undefined.
    """
    tokens, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, np.arange(width, dtype=np.int32)[None] < lengths[:, None]
