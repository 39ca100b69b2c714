"""extend_and_attend: the attention of new tokens in generation, from their projections to the mixed values.

    q, k = rotate(q), rotate(k)         rotary positions, if any
    cache[length ..] = k, v             in the format of the cache
    o = cached_attention(q, cache)      of each new token over the keys it may see

As one custom call on CPU; by XLA these are a dozen small operations a layer, which take as long to run as the
attention of a short text, and most of the time to compile a program of many layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu
from bitnet_kernels.attention import IMPLEMENTATIONS, check_attention, reference_attention
from bitnet_kernels.dtypes import floats, integers
from bitnet_kernels.kv_cache import KVCache, rotate, write


def extend_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    visible: jax.Array,
    scale: float,
    *,
    length: jax.Array,
    rows: jax.Array | None = None,
    angles: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """Appends T new tokens to a cache and attends over it -> o float32 [B, T, H, h] and the extended cache.

    Args:
      q: float [B, T, H, h]; k, v: float [B, T, K, h]; all are converted to float32.
      cache: with room for S positions, see KVCache; of B rows, or R >= B with `rows`.
      visible: bool [B, T, S], see `cached_attention`.
      scale: factor on q.k, a Python number.
      length: int [] or [B], the number of positions written before; beyond S - T it is taken as S - T.
      rows: int [B], the row of the cache that each sequence has, all different; None: sequence i has row i.
      angles: float32 [B, T, h], see `kv_cache.rotate`; None: q and k are not rotated.
      implementation: as in `cached_attention`. The cache is bit-identical, except for fused multiply-adds that XLA's
        compiler may use in a rotation; for o see `cached_attention`.

    Works under jit, vmap (sequentially), scan and while_loop; under jit the cache is extended in place if it is donated
    or carried by a loop.

    Raises:
      ValueError: inconsistent shapes or dtypes, an unknown implementation.
      NotImplementedError: implementation="cpu" without the C++ library; any attempt to differentiate.
    """
    q, k, v = (floats(name, x).astype(jnp.float32) for name, x in {"q": q, "k": k, "v": v}.items())
    if k.ndim == 4 and k.shape[1] > cache.k.shape[1]:
        raise ValueError(
            f"got {k.shape[1]} tokens for a cache of {cache.k.shape[1]} positions; make a longer cache"
        )
    q, *arrays, visible = check_attention(
        q, cache.k, cache.v, visible, cache.k_scale, cache.v_scale, any_rows=rows is not None
    )
    B, T, _, h = q.shape
    K = cache.k.shape[2]
    for new, x in {"k": k, "v": v}.items():
        if x.shape != (B, T, K, h):
            raise ValueError(f"new {new} is {list(x.shape)}; expected {[B, T, K, h]}")
    start = integers("length", length).astype(jnp.int32)
    if start.shape not in ((), (B,)):
        raise ValueError(f"length has shape {start.shape}; expected () or ({B},)")
    places = jnp.arange(B, dtype=jnp.int32) if rows is None else integers("rows", rows).astype(jnp.int32)
    if places.shape != (B,) or cache.k.shape[0] < B:
        raise ValueError(
            f"rows has shape {places.shape} for {cache.k.shape[0]} rows of the cache; expected ({B},)"
        )
    if angles is None:
        angles = jnp.zeros((B, T, 0), jnp.float32)
    elif angles.shape != (B, T, h) or angles.dtype != jnp.float32 or h % 2:
        raise ValueError(
            f"angles are {angles.dtype}{list(angles.shape)}; expected float32{[B, T, h]}, h even"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r}; expected None or one of {list(IMPLEMENTATIONS)}"
        )
    name, isa = cpu.resolve("extend_and_attend", implementation, cpu.unavailable())
    operation = _extend(float(scale), name, isa, by_row=rows is not None)
    o, *written = operation(q, k, v, *arrays, visible, jnp.broadcast_to(start, (B,)), places, angles)
    return o, KVCache(*written) if cache.k_scale is not None else KVCache(*written[:2])


@functools.cache
def _extend(
    scale: float, implementation: str | None, isa: str | None, by_row: bool
) -> Callable[..., tuple[jax.Array, ...]]:
    """The operation on validated arrays (q, new k, new v, k, v, k_scale, v_scale, visible, start, rows, angles);
    without scales these are [R, 0, K]."""

    def by_xla(q, k, v, cache_k, cache_v, k_scale, v_scale, visible, start, rows, angles):  # type: ignore[no-untyped-def]
        whole = [cache_k, cache_v, k_scale, v_scale]
        coded = cache_k.dtype == jnp.int8
        cache = KVCache(*(x[rows] if by_row else x for x in (whole if coded else whole[:2])))
        if angles.shape[-1]:
            q, k = rotate(q, angles), rotate(k, angles)
        T, S = q.shape[1], cache_k.shape[1]
        start = jnp.clip(start, 0, S - T)
        cache = write(cache, k, v, start)
        scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale} if coded else {}
        o = reference_attention(q, cache.k, cache.v, visible, scale, length=jnp.max(start) + T, **scales)
        written = [cache.k, cache.v, *scales.values()]
        if by_row:
            written = [x.at[rows].set(y) for x, y in zip(whole, written, strict=False)]
        return o, *written, *whole[len(written) :]

    by_cpu = cpu.extend_attention(scale, isa) if isa else by_xla
    branches = {"cpu": by_cpu} if implementation == "cpu" else {"cpu": by_cpu, "default": by_xla}

    @jax.custom_jvp
    def extend(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        if implementation == "reference":
            return by_xla(*arrays)
        return jax.lax.platform_dependent(*arrays, **branches)

    @extend.defjvp
    def refuse(primals: object, tangents: object) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        raise NotImplementedError(
            "extend_and_attend has no gradient; it is for inference. Train without a cache"
        )

    return jax.jit(extend)
