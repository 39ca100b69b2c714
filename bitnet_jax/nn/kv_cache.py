"""Key-value cache: floats, bfloat16 bits, or int8 codes with one scale per token and head."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Shaped

from bitnet_jax.quantization.scales import absmax, floats
from bitnet_jax.quantization.ste import straight_through


class KVCache(NamedTuple):
    """Keys (already rotated) and values of all positions; unwritten ones are masked by `visible`.

    float32; bfloat16, as such or as its bits in uint16 (XLA's CPU backend converts a whole bfloat16 array to write a
    few positions of it); or int8 codes with one scale per token and head, see `quantize_kv`.
    """

    k: Array  # [B, S, K, h]
    v: Array  # [B, S, K, h]
    k_scale: Float[Array, "B S K"] | None = None
    v_scale: Float[Array, "B S K"] | None = None


def quantize_kv(
    x: Float[Array, "B T K h"], bits: int = 8
) -> tuple[Int8[Array, "B T K h"], Float[Array, "B T K"]]:
    """int8 codes and one scale per token and head: `scale = max|x| / q`, `codes = round(x / scale)`,
    q = 2^(bits-1) - 1.

    codes * scale is within scale / 2 of x. If x is all 0, so are both. If x holds NaN or infinity, so does the
    scale, and all dequantized values of that token and head are NaN.
    """
    x, q = floats("x", x).astype(jnp.float32), 2 ** (bits - 1) - 1
    scale = absmax(x) / q
    codes = jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]), -q, q)
    return jnp.where(jnp.isfinite(scale)[..., None], codes, 0.0).astype(jnp.int8), scale


def fake_quantized_kv(x: Float[Array, "B T K h"], bits: int) -> Float[Array, "B T K h"]:
    """`quantize_kv` followed by dequantization. Backward: g."""
    codes, scale = quantize_kv(jax.lax.stop_gradient(x), bits)
    value = (codes.astype(jnp.float32) * scale[..., None]).astype(x.dtype)
    return straight_through(value, (x,), (jnp.ones_like(x),))


def write_at(
    old: Shaped[Array, "B S *rest"], new: Shaped[Array, "B T *rest"], length: Int[Array, "*rows"]
) -> Shaped[Array, "B S *rest"]:
    """`old` with `new` at [length, length + T) of axis 1; `length` is [], or [B] with one position per row."""
    if not length.ndim:
        return jax.lax.dynamic_update_slice_in_dim(old, new, length, axis=1)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(old, new, length)


def write(cache: KVCache, k: Array, v: Array, length: Int[Array, "*rows"]) -> KVCache:
    """Writes the keys and values [B, T, K, h] of new tokens at positions [length, length + T) of the cache.

    Raises:
      ValueError: T exceeds the capacity of the cache. (`length` is traced, so length + T <= S is not checked: the
        caller must ensure it.)
    """
    k, v = floats("k", k), floats("v", v)
    T, S = k.shape[1], cache.k.shape[1]
    if T > S:
        raise ValueError(f"got {T} tokens for a cache of {S} positions; make a longer cache")

    def at_length(old: Array, new: Array) -> Array:
        if old.dtype == jnp.uint16:
            new = jax.lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
        return write_at(old, new.astype(old.dtype), length)

    if cache.k_scale is None or cache.v_scale is None:
        return KVCache(at_length(cache.k, k), at_length(cache.v, v))
    (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
    return KVCache(
        at_length(cache.k, k),
        at_length(cache.v, v),
        at_length(cache.k_scale, k_scale),
        at_length(cache.v_scale, v_scale),
    )


def cached_keys_values(cache: KVCache) -> tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]:
    """The keys and values of a cache; codes are dequantized to float32."""
    if cache.k.dtype == jnp.uint16:
        k, v = (jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in (cache.k, cache.v))
        return k, v
    if cache.k_scale is None or cache.v_scale is None:
        return cache.k, cache.v
    k, v = cache.k.astype(jnp.float32), cache.v.astype(jnp.float32)
    return k * cache.k_scale[..., None], v * cache.v_scale[..., None]
