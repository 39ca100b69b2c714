"""softmax_attention: attention over a whole sequence, with a gradient and without its scores in memory.

    o_i = sum_j P_ij v_j,   P_ij = exp(s q_i.k_j) / sum_j' exp(s q_i.k_j')     j, j' over the visible keys

The forward pass is that of cached_attention: a token gets the same bits in training as in generation. The gradient
(kernels/csrc/attention_gradient.h) computes the scores again, a block of queries at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu
from bitnet_kernels.attention import check_attention

IMPLEMENTATIONS = ("cpu", "reference")


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention -> float32 [B, T, H, h], differentiable in q, k and v.

    "cpu" is bit-identical across instruction sets, thread counts and batch sizes, forward and backward; "reference" is
    jax.nn.dot_product_attention, on XLA with all scores in memory. Both are within rounding of each other.

    Args:
      q: float32 [B, T, H, h]. Query head j uses kv head j // (H / K).
      k, v: float32 [B, S, K, h].
      visible: bool [B, T, S], True where query i may attend to key j. A query with no visible key gives 0.
      scale: factor on q.k, a Python number.
      implementation: None selects the C++ kernels when compiling for CPU, else XLA, with a warning if the library is
        missing. "cpu" or "reference" forces one.

    Works under jit, grad, vmap (sequentially) and scan. BITNET_KERNELS_ISA is read at trace time.

    Raises:
      ValueError: inconsistent shapes or dtypes, an unknown implementation.
      NotImplementedError: implementation="cpu" without the C++ library.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r}; expected None or one of {list(IMPLEMENTATIONS)}"
        )
    if not q.dtype == k.dtype == v.dtype == jnp.float32:
        raise ValueError(f"got q {q.dtype}, k {k.dtype}, v {v.dtype}; expected float32")
    check_attention(q, k, v, visible, None, None)
    name, isa = cpu.resolve("attention in training", implementation, cpu.unavailable())
    return _attention(float(scale), name, isa)(q, k, v, visible)


@functools.cache
def _attention(scale: float, implementation: str | None, isa: str | None) -> Callable[..., jax.Array]:
    def by_xla(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        o = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], scale=scale)
        return jnp.where(jnp.any(visible, axis=-1)[:, :, None, None], o, 0.0)

    def gradient_by_xla(
        q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, dout: jax.Array
    ) -> tuple[jax.Array, ...]:
        _, pullback = jax.vjp(lambda q, k, v: by_xla(q, k, v, visible), q, k, v)
        return tuple(pullback(dout))

    if isa is None:
        return by_xla

    def by_cpu(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        no_scale = jnp.zeros((k.shape[0], 0, k.shape[2]), jnp.float32)
        return cpu.attention(scale, isa)(q, k, v, no_scale, no_scale, visible, jnp.int32(k.shape[1]))

    others = implementation is None

    @jax.custom_vjp
    def attention(*operands: jax.Array) -> jax.Array:
        branches = {"cpu": by_cpu} | ({"default": by_xla} if others else {})
        return jax.lax.platform_dependent(*operands, **branches)

    def forward(*operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return attention(*operands), operands

    def backward(operands: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array | None, ...]:
        branches = {"cpu": cpu.attention_gradient(scale, isa)}
        branches |= {"default": gradient_by_xla} if others else {}
        return (*jax.lax.platform_dependent(*operands, dout, **branches), None)

    attention.defvjp(forward, backward)
    return attention
