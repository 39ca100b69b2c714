"""The cache used in generation: creating it, growing it, and its size in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bitnet_jax.models import ModelConfig
from bitnet_jax.models.transformer import Cache
from bitnet_jax.names import check_name
from bitnet_jax.nn.kv_cache import KVCache
from bitnet_jax.nn.linear_attention import LinearState, zero_state

KV_FORMATS = ("float32", "bfloat16", "int8")


def default_kv_format(config: ModelConfig, variables: Mapping[str, Any]) -> str:
    """The format of the cache in generation: bfloat16 for a packed model, else the model's compute dtype.

    A decode step reads the keys and values of all positions so far. What bfloat16 and int8 cost in quality is measured
    in experiments/studies/kv_format.
    """
    return "bfloat16" if variables.get("packed") else config.dtype


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str | None = None) -> Cache:
    """An empty cache with room for `length` positions of `batch` sequences.

    Args:
      dtype: of keys and values, one of KV_FORMATS; None: the model's compute dtype, which is lossless. "int8" stores
        codes with a scale per token and head (`nn.kv_cache.quantize_kv`). The state of linear attention is always
        float32 and does not grow with `length`.

    Raises:
      ValueError: an unknown dtype, or the model is not a causal language model.
    """
    if not config.causal or config.num_classes:
        raise ValueError(
            f"a cache needs a causal language model, got causal={config.causal}, "
            f"num_classes={config.num_classes}"
        )

    dtype = dtype or config.dtype
    check_name("dtype of keys and values", dtype, KV_FORMATS)

    def layer() -> KVCache | LinearState:
        if config.attention == "linear":
            return zero_state(batch, config.num_heads, config.head_size)
        shape = (batch, length, config.kv_heads, config.head_size)
        # Two separate arrays: the cache is donated, and a buffer can be donated only once.
        stored = "uint16" if dtype == "bfloat16" else dtype  # as bits, see KVCache
        keys, values = jnp.zeros(shape, stored), jnp.zeros(shape, stored)
        if dtype != "int8":
            return KVCache(keys, values)
        return KVCache(keys, values, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape[:-1], jnp.float32))

    return Cache(
        layers=tuple(layer() for _ in range(config.num_layers)),
        valid=jnp.zeros((batch, length), bool),
        length=jnp.zeros((), jnp.int32),
    )


def extend_cache(cache: Cache, length: int) -> Cache:
    """The same cache with room for `length` positions, which must not be less than its current room."""

    def longer(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    layers = tuple(
        layer if isinstance(layer, LinearState) else jax.tree.map(longer, layer) for layer in cache.layers
    )
    return Cache(layers, longer(cache.valid), cache.length)


def kv_bytes(config: ModelConfig, length: int, dtype: str | None = None) -> int:
    """Cache bytes of one sequence of `length` positions; arguments as in `init_cache`."""
    layers = jax.eval_shape(lambda: init_cache(config, 1, length, dtype)).layers
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
