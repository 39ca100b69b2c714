"""Checksums of arrays that do not depend on how they are split over devices and processes.

    checksum(x) = sum over i, j, … of word(x[i, j, …]) * a(i) * b(j) * …   modulo 2**64

where a word is the bit pattern of an element and the weights are odd pseudo-random numbers, different for each axis. So
a changed element always changes the sum, and the sums of the parts of an array add up to that of the array: no process
needs the whole of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bitnet_jax.training.distributed import exchange

BLOCK = 1 << 20  # elements that are widened to 64 bits at a time


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The checksum of each array; with several processes, every one gets those of the whole arrays."""
    parts = exchange({name: _local_sum(array) for name, array in arrays.items()})
    return {name: sum(part[name] for part in parts) % 2**64 for name in arrays}


def crc32s(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The CRC-32 of each array, as in the checkpoints of earlier versions."""
    return {
        name: zlib.crc32(np.ascontiguousarray(_whole(array)).reshape(-1).view(np.uint8).data)
        for name, array in arrays.items()
    }


def _whole(array: jax.Array) -> Any:
    return array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)


def _local_sum(array: jax.Array) -> int:
    """The sum over the parts of the array in this process, each once."""
    shards = (shard for shard in array.addressable_shards if shard.replica_id == 0)
    return sum(
        block_sum(np.asarray(shard.data), [axis.start or 0 for axis in shard.index]) for shard in shards
    )


def block_sum(block: np.ndarray, starts: list[int]) -> int:
    """The sum over a block of an array that begins at these indices. For an array without axes: its word."""
    words = np.asarray(block, order="C").view(np.dtype(f"uint{8 * block.dtype.itemsize}"))
    weights = [
        _weights(axis, start, size)
        for axis, (start, size) in enumerate(zip(starts, block.shape, strict=True))
    ]
    if not weights:
        return int(words)
    total = 0
    rows = max(1, BLOCK // max(1, words[0].size if len(words) else 1))
    for first in range(0, len(words), rows):
        sums = words[first : first + rows].astype(np.uint64)
        for of_axis in reversed(weights[1:]):
            sums = sums @ of_axis
        total += int(sums @ weights[0][first : first + rows])
    return total % 2**64


def _weights(axis: int, start: int, size: int) -> np.ndarray:
    """Odd uint64 numbers for the indices [start, start + size) of an axis: the finalizer of SplitMix64."""
    index = np.arange(start, start + size, dtype=np.uint64) + np.uint64(axis << 48)
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
