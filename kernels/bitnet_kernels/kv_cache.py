"""Key-value cache: floats, bfloat16 bits, or int8 codes with one scale per token and head."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels.dtypes import floats
from bitnet_kernels.reference import absmax


class KVCache(NamedTuple):
    """Keys (already rotated) and values of all positions; unwritten ones are masked by the caller.

    float32; bfloat16, as such or as its bits in uint16 (XLA's CPU backend converts a whole bfloat16 array to write a
    few positions of it); or int8 codes with one scale per token and head, see `quantize_kv`.
    """

    k: jax.Array  # [B, S, K, h]
    v: jax.Array  # [B, S, K, h]
    k_scale: jax.Array | None = None  # float32 [B, S, K]
    v_scale: jax.Array | None = None


def quantize_kv(x: jax.Array, bits: int = 8) -> tuple[jax.Array, jax.Array]:
    """float [B, T, K, h] -> int8 codes of the same shape and one scale per token and head, float32 [B, T, K].

    `scale = max|x| (1 / q)`, `codes = round(x / scale)`, q = 2^(bits-1) - 1. codes * scale is within scale / 2 of x. If
    x is all 0, so are both. If x holds NaN or infinity, so does the scale, and all dequantized values of that token and
    head are NaN.
    """
    x, q = floats("x", x).astype(jnp.float32), 2 ** (bits - 1) - 1
    scale = absmax(x) * np.float32(1 / q)  # XLA compiles a division by q to this, but only under jit
    codes = jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]), -q, q)
    return jnp.where(jnp.isfinite(scale)[..., None], codes, 0.0).astype(jnp.int8), scale


def write_at(old: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
    """`old` [B, S, ...] with `new` [B, T, ...] at [length, length + T) of axis 1; `length` is [], or [B] with one
    position per row."""
    if not length.ndim:
        return jax.lax.dynamic_update_slice_in_dim(old, new, length, axis=1)
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(old, new, length)


def write(cache: KVCache, k: jax.Array, v: jax.Array, length: jax.Array) -> KVCache:
    """Writes the keys and values [B, T, K, h] of new tokens at positions [length, length + T) of the cache.

    Raises:
      ValueError: T exceeds the capacity of the cache. (`length` is traced, so length + T <= S is not checked: the
        caller must ensure it.)
    """
    k, v = floats("k", k), floats("v", v)
    T, S = k.shape[1], cache.k.shape[1]
    if T > S:
        raise ValueError(f"got {T} tokens for a cache of {S} positions; make a longer cache")

    def at_length(old: jax.Array, new: jax.Array) -> jax.Array:
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


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the channel pairs (i, i + h/2) of each head of x float [B, T, H, h].

    angles: float32 [B, T, h], the cosines of h/2 angles and then their sines, cast to the dtype of x. As complex
    numbers `(x_i + 1j x_{i+h/2}) * (cos_i + 1j sin_i)`.
    """
    cos, sin = jnp.split(angles.astype(x.dtype)[:, :, None, :], 2, axis=-1)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
