"""cached_attention: softmax attention of new queries over a cache of keys and values.

    o_i = sum_j P_ij v_j,   P_ij = exp(s q_i.k_j) / sum_j' exp(s q_i.k_j')     j, j' over the visible keys

`reference_attention` is the definition, in float32 by XLA. The C++ kernels (csrc/attention.h) read only the
positions that are written, never hold the scores of more than a chunk of keys, and differ from it by rounding.
Their own bits depend on the query, its keys and what it sees, and on nothing else: not on the instruction set,
the threads, the batch, or the queries beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu

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
    """The definition of `cached_attention`, with the scores of all keys in memory."""
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    written = jnp.arange(S, dtype=jnp.int32) < length

    def floats(x: jax.Array, x_scale: jax.Array | None) -> jax.Array:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
        x = x.astype(jnp.float32)
        x = x if x_scale is None else x * x_scale[..., None]
        return jnp.where(written[None, :, None, None], x, 0.0)

    k, v = floats(k, k_scale), floats(v, v_scale)
    seen = (visible & written[None, None])[:, None, None]
    grouped = q.astype(jnp.float32).reshape(B, T, K, H // K, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * scale
    # The lowest number, not -inf: a row of -inf is NaN.
    p = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", jnp.where(seen, p, 0.0), v).reshape(B, T, H, h)


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
      q: float [B, T, H, h], computed in float32. Query head j reads kv head j // (H / K).
      k, v: [B, S, K, h], both float32, bfloat16 (or its bits, uint16) or int8. Positions from `length` on are not
        read.
      visible: bool [B, T, S], True where query i may read key j. A query that sees no key gives 0.
      scale: a Python number, times q.k.
      length: int32 [], the number of positions that are written; more than S counts as S.
      k_scale, v_scale: float32 [B, S, K], the step of int8 codes per token and head; for int8 only.
      implementation: None takes the C++ kernels where the code is compiled for a CPU, else XLA, with a warning
        where the library is missing. "cpu" or "reference" is an order.

    Works under jit, vmap (one call after the other), scan and while_loop. BITNET_KERNELS_ISA is read when a call
    is traced.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation.
      NotImplementedError: implementation="cpu" without the C++ library; any attempt to differentiate.
    """
    arrays = _checked(q, k, v, visible, k_scale, v_scale)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r}; expected None or one of {list(IMPLEMENTATIONS)}"
        )
    name, isa = cpu.resolve("cached_attention", implementation, cpu.unavailable())
    return _attention(float(scale), name, isa)(*arrays, jnp.asarray(length, jnp.int32))


def _checked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """q in float32, k, v, scales (of no positions where there are none) and visible, of shapes that fit."""
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype}{list(q.shape)}; expected a float type and [B, T, H, h]")
    B, T, H, h = q.shape
    if k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, h) or H % max(1, k.shape[2]):
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
        if (x is not None) != coded or (x is not None and (x.shape, x.dtype) != ((B, S, K), jnp.float32)):
            got = "None" if x is None else f"{x.dtype}{list(x.shape)}"
            expected = f"float32{[B, S, K]} for int8 keys and values" if coded else f"None for {k.dtype}"
            raise ValueError(f"k_scale or v_scale is {got}; expected {expected}")
    nothing = jnp.zeros((B, 0, K), jnp.float32)
    scales = [nothing if x is None else x for x in (k_scale, v_scale)]
    return q.astype(jnp.float32), k, v, *scales, visible


@functools.cache
def _attention(scale: float, implementation: str | None, isa: str | None) -> Callable[..., jax.Array]:
    """The operation on checked arrays (q, k, v, k_scale, v_scale, visible, length)."""

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
