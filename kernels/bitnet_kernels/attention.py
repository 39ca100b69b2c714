"""cached_attention: softmax attention of new queries over a cache of keys and values.

    o_i = sum_j P_ij v_j,   P_ij = exp(s q_i.k_j) / sum_j' exp(s q_i.k_j')     j, j' over the visible keys

Masked keys and values never affect a query, not even with NaN; NaN in visible ones gives NaN.

`reference_attention` is the definition, in float32 with XLA. The C++ kernels (csrc/attention.h) read only written
positions, hold the scores of one chunk of keys at a time, and differ from it by rounding. Their result for a query
depends only on the query, its keys and values and its mask; it is bit-identical across instruction sets, thread
counts, batch sizes and other queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu
from bitnet_kernels.dtypes import FLOATS, integers

IMPLEMENTATIONS = ("cpu", "reference")
KV_DTYPES = ("float32", "bfloat16", "uint16", "int8")  # uint16: the bits of bfloat16


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float,
    *,
    length: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """The definition of `cached_attention`, with the scores of all keys in memory.

    Raises:
      ValueError: inconsistent shapes or dtypes.
    """
    check_attention(q, k, v, visible, k_scale, v_scale)
    length = integers("length", length).astype(jnp.int32)
    B, T, H, h = q.shape
    S, K = k.shape[1:3]

    def floats(x: jax.Array) -> jax.Array:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
        return x.astype(jnp.float32)

    def per_key(x_scale: jax.Array) -> jax.Array:
        """[B, S, K] -> [B, K, 1, 1, S]"""
        return jnp.moveaxis(x_scale, 1, 2)[:, :, None, None]

    written = jnp.arange(S, dtype=jnp.int32) < length
    seen = (visible & written[None, None])[:, None, None]
    grouped = (q.astype(jnp.float32) * scale).reshape(B, T, K, H // K, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, floats(k))
    scores = scores if k_scale is None else scores * per_key(k_scale)
    # The finite minimum, not -inf: a row of -inf would give NaN.
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(seen, scores, lowest)
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=lowest)
    p = jnp.where(seen, jnp.exp(scores - jax.lax.stop_gradient(largest)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    weights = p if v_scale is None else jnp.where(seen, p * per_key(v_scale), 0.0)
    o = _mix(weights, floats(v), seen) / jnp.where(jnp.any(seen, axis=-1, keepdims=True), total, 1.0)
    return jnp.moveaxis(o, 3, 1).reshape(B, T, H, h)


def _mix(weights: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Weighted sums of values v [B, S, K, h] with weights [B, K, G, T, S], 0 where not seen -> [B, K, G, T, h].

    Non-finite values must affect only queries that see them, although 0 times them is NaN.
    """
    dot = functools.partial(jnp.einsum, "bkgts,bskh->bkgth")
    finite = jnp.isfinite(v)

    def with_non_finite(weights: jax.Array, v: jax.Array) -> jax.Array:
        o = dot(weights, jnp.where(finite, v, 0.0))
        for value in (jnp.nan, jnp.inf, -jnp.inf):
            holds = jnp.isnan(v) if value != value else v == value
            meets = (
                dot(jnp.broadcast_to(seen, weights.shape).astype(jnp.float32), holds.astype(jnp.float32)) > 0
            )
            o = o + jnp.where(meets, value, 0.0)
        return o

    return jax.lax.cond(jnp.all(finite), dot, with_non_finite, weights, v)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float,
    *,
    length: jax.Array | int,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention over the first `length` positions of a cache -> float32 [B, T, H, h].

    Args:
      q: float [B, T, H, h], converted to float32. Query head j uses kv head j // (H / K).
      k, v: [B, S, K, h], both float32, bfloat16 (or its bits, uint16) or int8. Positions from `length` on are not
        read.
      visible: bool [B, T, S], True where query i may attend to key j. A query with no visible key gives 0.
      scale: factor on q.k, a Python number.
      length: int32 [], number of written positions; values above S are treated as S.
      k_scale, v_scale: float32 [B, S, K], scale of int8 codes per token and head; for int8 only.
      implementation: None selects the C++ kernels when compiling for CPU, else XLA, with a warning if the library is
        missing. "cpu" or "reference" forces one.

    Works under jit, vmap (sequentially), scan and while_loop. BITNET_KERNELS_ISA is read at trace time.

    Raises:
      ValueError: inconsistent shapes or dtypes, an unknown implementation.
      NotImplementedError: implementation="cpu" without the C++ library; any attempt to differentiate.
    """
    arrays = check_attention(q, k, v, visible, k_scale, v_scale)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r}; expected None or one of {list(IMPLEMENTATIONS)}"
        )
    name, isa = cpu.resolve("cached_attention", implementation, cpu.unavailable())
    return _attention(float(scale), name, isa)(*arrays, integers("length", length).astype(jnp.int32))


def check_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    any_rows: bool = False,
) -> tuple[jax.Array, ...]:
    """Validates the arguments; returns q in float32, k, v, scales (with no positions if None) and visible.

    Args:
      any_rows: k and v may have another number of rows than q.
    """
    if q.ndim != 4 or q.dtype.name not in FLOATS:
        raise ValueError(f"q is {q.dtype}{list(q.shape)}; expected {', '.join(FLOATS)} and [B, T, H, h]")
    B, T, H, h = q.shape
    R = k.shape[0] if any_rows and k.ndim else B
    if k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (R, h) or H % max(1, k.shape[2]):
        raise ValueError(
            f"k is {list(k.shape)} and v {list(v.shape)} for q {list(q.shape)}; "
            "expected [B, S, K, h], H a multiple of K"
        )
    if k.dtype != v.dtype or k.dtype.name not in KV_DTYPES:
        raise ValueError(f"k is {k.dtype} and v {v.dtype}; expected both one of {list(KV_DTYPES)}")
    S, K = k.shape[1:3]
    if visible.shape != (B, T, S) or visible.dtype != bool:
        raise ValueError(f"visible is {visible.dtype}{list(visible.shape)}; expected bool{[B, T, S]}")
    coded = k.dtype == jnp.int8
    for x in (k_scale, v_scale):
        if (x is not None) != coded or (x is not None and (x.shape, x.dtype) != ((R, S, K), jnp.float32)):
            got = "None" if x is None else f"{x.dtype}{list(x.shape)}"
            expected = f"float32{[R, S, K]} for int8 keys and values" if coded else f"None for {k.dtype}"
            raise ValueError(f"k_scale or v_scale is {got}; expected {expected}")
    no_scale = jnp.zeros((R, 0, K), jnp.float32)
    scales = [no_scale if x is None else x for x in (k_scale, v_scale)]
    return q.astype(jnp.float32), k, v, *scales, visible


@functools.cache
def _attention(scale: float, implementation: str | None, isa: str | None) -> Callable[..., jax.Array]:
    """The operation on validated arrays (q, k, v, k_scale, v_scale, visible, length)."""

    def by_xla(q, k, v, k_scale, v_scale, visible, length):  # type: ignore[no-untyped-def]
        scales = {"k_scale": k_scale, "v_scale": v_scale} if k.dtype == jnp.int8 else {}
        return reference_attention(q, k, v, visible, scale, length=length, **scales)

    by_cpu = cpu.attention(scale, isa) if isa else by_xla
    branches = {"cpu": by_cpu} if implementation == "cpu" else {"cpu": by_cpu, "default": by_xla}

    @jax.custom_jvp
    def attention(*arrays: jax.Array) -> jax.Array:
        if implementation == "reference":
            return by_xla(*arrays)
        return jax.lax.platform_dependent(*arrays, **branches)

    @attention.defjvp
    def refuse(primals: object, tangents: object) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError(
            "cached_attention has no gradient; it is for inference. Train without a cache, or differentiate "
            "reference_attention"
        )

    return jax.jit(attention)
