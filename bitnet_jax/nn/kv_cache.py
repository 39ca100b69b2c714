"""Key-value caches of bitnet_kernels as the modules use them: quantization in training, and their values as floats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization.ste import straight_through
from bitnet_kernels.kv_cache import KVCache, quantize_kv, write, write_at

__all__ = ["KVCache", "cached_keys_values", "fake_quantized_kv", "quantize_kv", "write", "write_at"]


def fake_quantized_kv(x: Float[Array, "B T K h"], bits: int) -> Float[Array, "B T K h"]:
    """`quantize_kv` followed by dequantization. Backward: g."""
    codes, scale = quantize_kv(jax.lax.stop_gradient(x), bits)
    value = (codes.astype(jnp.float32) * scale[..., None]).astype(x.dtype)
    return straight_through(value, (x,), (jnp.ones_like(x),))


def cached_keys_values(cache: KVCache) -> tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]:
    """The keys and values of a cache; codes are dequantized to float32."""
    if cache.k.dtype == jnp.uint16:
        k, v = (jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in (cache.k, cache.v))
        return k, v
    if cache.k_scale is None or cache.v_scale is None:
        return cache.k, cache.v
    k, v = cache.k.astype(jnp.float32), cache.v.astype(jnp.float32)
    return k * cache.k_scale[..., None], v * cache.v_scale[..., None]
