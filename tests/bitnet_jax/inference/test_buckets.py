"""Buckets, the sizes that prompts and caches are padded to: few, tight, and within the model's limit."""

from __future__ import annotations

import dataclasses

import pytest

from bitnet_jax.inference.buckets import bucket, cache_capacity, prompt_width
from bitnet_jax.models import PRESETS

CONFIG = dataclasses.replace(PRESETS["tiny"], max_length=4096)


@pytest.mark.parametrize(("smallest", "parts"), [(16, 4), (64, 2)])
def test_a_bucket_fits_its_sizes_and_wastes_at_most_a_fraction_of_an_octave(
    smallest: int, parts: int
) -> None:
    buckets = [bucket(size, smallest, parts) for size in range(1, 5000)]
    assert buckets == sorted(buckets)
    for size, padded in enumerate(buckets, start=1):
        assert size <= padded < size + max(smallest, size / parts)
        assert bucket(padded, smallest, parts) == padded


def test_the_buckets_of_a_model_are_few_and_end_at_its_max_length() -> None:
    widths = sorted({prompt_width(CONFIG, size) for size in range(1, 4097)})
    assert widths[:10] == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192]
    assert (len(widths), widths[-1]) == (28, 4096)
    rooms = sorted({cache_capacity(CONFIG, size) for size in range(1, 4097)})
    assert rooms == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    odd = dataclasses.replace(CONFIG, max_length=100)
    assert (prompt_width(odd, 97), cache_capacity(odd, 65), cache_capacity(odd, 1)) == (100, 100, 64)


@pytest.mark.parametrize("longest", [1, 40, 64, 100, 4096])
def test_a_prompt_fits_into_the_cache_of_its_text(longest: int) -> None:
    config = dataclasses.replace(CONFIG, max_length=longest)
    for size in range(1, longest + 1):
        assert size <= prompt_width(config, size) <= cache_capacity(config, size) <= longest
        assert cache_capacity(config, prompt_width(config, size)) == cache_capacity(config, size)
