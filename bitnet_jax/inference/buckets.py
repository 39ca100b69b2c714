"""The few sizes that prompts and caches are padded to, so that any lengths need few compiled programs.

    prompt_width    16, 32, ..., 128, then four sizes in an octave: at most a quarter of the prompt is padding
    cache_room      64, 128, 192, 256, then two sizes in an octave: at most a third of the cache is never written

Both end at the model's max_length, so the number of sizes grows with its logarithm.
"""

from __future__ import annotations

from bitnet_jax.models import ModelConfig


def bucket(size: int, smallest: int, parts: int) -> int:
    """The next multiple of `smallest`, or of 2^k / parts for sizes in (2^k, 2^(k+1)] where that is coarser."""
    octave = 1 << max(size - 1, 1).bit_length() - 1  # the largest power of two below size
    step = max(smallest, octave // parts)
    return -(-size // step) * step


def prompt_width(config: ModelConfig, tokens: int) -> int:
    """Tokens that a prompt of `tokens` tokens is padded to."""
    return min(bucket(tokens, smallest=16, parts=4), config.max_length)


def cache_room(config: ModelConfig, positions: int) -> int:
    """Positions of a cache that has to hold `positions`; no fewer than `prompt_width`."""
    return min(bucket(positions, smallest=64, parts=2), config.max_length)
