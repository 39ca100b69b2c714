"""A packed model with random weights of any size, streamed to disk with a few MiB of memory.

For benchmarks, where only shapes and formats matter. Codes are uniform over the values of the format, scales preserve
the magnitude of a layer's input, float matrices and embeddings are normal, gains and learned scales 1, biases and
shifts 0.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.packed.storage import save_packed
from bitnet_jax.packed.tensor_file import Streamed
from bitnet_jax.progress import progress_bar
from bitnet_kernels import FORMATS, PackedArray
from bitnet_kernels.random_packed import random_panels

POOL = 1_048_573  # normal numbers drawn, then repeated; a prime, so that the rows of a matrix differ


def write_random(
    folder: str | Path,
    config: ModelConfig,
    seed: int = 0,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a packed model `config` with random weights, to be read by `storage.load_packed`.

    Args:
      progress: show a progress bar on stderr.

    Raises:
      StorageError: see `storage.save_packed`; for example not enough disk space.
    """
    abstract = packing.abstract(config)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _random(jax.tree_util.keystr(path), leaf, config.init_std, seed),
        abstract,
        is_leaf=lambda leaf: isinstance(leaf, PackedArray),
    )
    with progress_bar(
        packing.sizes(abstract).total, unit="B", description=f"random weights to {folder}", show=progress
    ) as bar:
        save_packed(folder, variables, config, overwrite=overwrite, on_bytes=bar.update)


def _random(path: str, leaf: Any, std: float, seed: int) -> Any:
    """Random values for one leaf of the abstract model, with a seed derived from its path."""
    leaf_seed = zlib.crc32(path.encode(), seed)
    if isinstance(leaf, PackedArray):
        return _random_matrix(leaf, leaf_seed)
    if len(leaf.shape) >= 2:
        return Streamed(leaf.shape, leaf.dtype, _normal(leaf, std, leaf_seed))
    return np.full(leaf.shape, 1 if "scale" in path else 0, leaf.dtype)


def _random_matrix(leaf: PackedArray, seed: int) -> PackedArray:
    chunks = random_panels(leaf.format, leaf.shape, leaf.groups, seed)
    values = np.array(FORMATS[leaf.format].values, np.float64)
    centre = values.mean() if leaf.minimum is not None else 0.0  # which the minimum takes away
    size = 1 / math.sqrt(leaf.shape[1] * np.mean(np.square(values - centre)))
    scale = size * np.random.default_rng(seed).uniform(0.9, 1.1, leaf.scale.shape)
    minimum = None if leaf.minimum is None else jnp.asarray(-centre * scale, leaf.scale.dtype)
    stream: Any = Streamed(
        leaf.codes.shape, leaf.codes.dtype, chunks
    )  # stands in for the array until written
    return dataclasses.replace(
        leaf, codes=stream, scale=jnp.asarray(scale, leaf.scale.dtype), minimum=minimum
    )


def _normal(leaf: jax.ShapeDtypeStruct, std: float, seed: int) -> Iterator[np.ndarray]:
    size = math.prod(leaf.shape)
    pool = np.random.default_rng(seed).normal(0, std, min(size, POOL)).astype(leaf.dtype)
    for begin in range(0, size, POOL):
        yield pool[: size - begin]
