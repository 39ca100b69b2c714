"""Optional transforms around an activation quantizer: rotation before it, sparsity after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.names import check_name
from bitnet_jax.quantization.scales import as_float32
from bitnet_jax.quantization.ste import straight_through

TOP_K_STES = ("identity", "masked")


def top_k(
    x: Float[Array, "... k"], fraction: float, by: Float[Array, "... k"] | None = None, ste: str = "identity"
) -> Float[Array, "... k"]:
    """Zeroes all but the largest entries of each token (Q-Sparse 2407.10969, a4.8's attention output).

    Forward:  x 1[|by| >= its m-th largest], m = max(1, round(fraction k)), by = x by default; ties are all kept.
    Backward: g, also for zeroed entries; with ste="masked" (Q-Sparse's ablation), 0 for them.
    """
    check_name("STE of top_k", ste, TOP_K_STES)
    k = x.shape[-1]
    keep = max(1, round(fraction * k))
    if not 0 < fraction <= 1:
        raise ValueError(f"top_k fraction: got {fraction}, expected 0 < fraction <= 1")
    size = jnp.abs(jax.lax.stop_gradient(x if by is None else by))
    threshold = _nth_largest(size, keep)
    slope = jnp.ones_like(x) if ste == "identity" else (size >= threshold).astype(x.dtype)
    return straight_through(jnp.where(size < threshold, 0, x), (x,), (slope,))


def _nth_largest(x: Float[Array, "... k"], n: int) -> Float[Array, "... 1"]:
    """The n-th largest of each row of non-negative numbers, exact, NaN ranked largest.

    Binary search over the bits, most significant first: non-negative floats order like their bit patterns. On CPU ten
    times as fast as XLA's sort.
    """
    bits = jax.lax.bitcast_convert_type(as_float32(x), jnp.int32)

    def lower_bit(i: Array, found: Array) -> Array:
        candidate = found | (jnp.int32(1 << 30) >> i)
        enough = jnp.sum(bits >= candidate, axis=-1, keepdims=True) >= n
        return jnp.where(enough, candidate, found)

    found = jax.lax.fori_loop(0, 31, lower_bit, jnp.zeros_like(bits[..., :1]))
    return jax.lax.bitcast_convert_type(found, jnp.float32).astype(x.dtype)


def hadamard(x: Float[Array, "... k"], block: bool = False) -> Float[Array, "... k"]:
    """Orthonormal Walsh-Hadamard transform of the last axis in k log2(k) additions (BitNet v2, 2504.18415).

    Forward:  H x, with H_0 = 1 and H_m = [[H, H], [H, -H]] / sqrt(2); H is symmetric and its own inverse.
    Backward: H g.

    k must be a power of two; block=True transforms blocks of the largest power of two that divides k instead.
    """
    k = x.shape[-1]
    size = k & -k
    if size != k and not block:
        raise ValueError(
            f"hadamard: got an axis of {k}, expected a power of two; "
            f"choose another width, or hadamard='block' for blocks of {size}"
        )
    y = as_float32(x).reshape(*x.shape[:-1], k // size, size)
    for _ in range(size.bit_length() - 1):
        # Each stage transforms the lowest bit of the index and moves it to the top; the last stage restores the order.
        pairs = y.reshape(*y.shape[:-1], size // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        y = jnp.concatenate([a + b, a - b], axis=-1)
    return y.reshape(x.shape) * (1 / size**0.5)
