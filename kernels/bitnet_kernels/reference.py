"""The definition of every operation, in plain jnp. The fast paths are tested to equal it bit for bit.

Axis letters: m rows of x, n outputs, k inputs, G scale groups of g = k / G inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bitnet_kernels.formats import unpack
from bitnet_kernels.packed import PackedArray

EPSILON = 1e-5  # of the absmax of a token; the released BitNet b1.58 2B-4T uses the same


def quantize_activations(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Absmax int8 per token: x float [..., k] -> (codes int8 [..., k], scale float32 [..., 1]).

    s = 127 / max(max|x|, 1e-5);  codes = clip(round(x s), -128, 127);  scale = 1 / s.
    """
    x = x.astype(jnp.float32)
    s = 127.0 / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), EPSILON)
    # Without the barrier XLA turns 1 / (127 / max) into max * (1 / 127), which is not the same float.
    scale = 1.0 / jax.lax.optimization_barrier(s)
    return jnp.clip(jnp.round(x * s), -128, 127).astype(jnp.int8), scale


def integer_matmul(x: jax.Array, w: PackedArray) -> jax.Array:
    """int8 codes [m, k] times a packed matrix -> int32 [G, m, n], one exact sum per scale group.

    A sum of g products of size up to 128 stays below 2^24 up to g = 131071; float32 is exact there, in any
    order of summation, and XLA's float32 dot is its fastest exact one on every platform.
    """
    m, n = x.shape[0], w.shape[0]
    dtype = jnp.float32 if 128 * w.group_size < 2**24 else jnp.int32
    a = x.astype(dtype).reshape(m, w.groups, w.group_size)
    b = unpack(w).astype(dtype).reshape(n, w.groups, w.group_size)
    sums = jnp.einsum("mgk,ngk->gmn", a, b, precision="highest", preferred_element_type=dtype)
    return sums.astype(jnp.int32)


def float_matmul(x: jax.Array, w: PackedArray) -> jax.Array:
    """float [m, k] times the unpacked codes -> float32 [G, m, n]: weight-only quantization."""
    m, n = x.shape[0], w.shape[0]
    a = x.astype(jnp.float32).reshape(m, w.groups, w.group_size)
    b = unpack(w).astype(jnp.float32).reshape(n, w.groups, w.group_size)
    return jnp.einsum("mgk,ngk->gmn", a, b, precision="highest")


def rescale(sums: jax.Array, scale: jax.Array) -> jax.Array:
    """Sums [G, m, n] and the scale of the matrix -> float32 [m, n], the one rescale of every implementation.

    y = sums[0] * scale[:, 0] + sums[1] * scale[:, 1] + ..., each product and sum rounded, in this order.
    """
    factors = scale.T[:, None, :]
    products = sums.astype(jnp.float32) * factors
    if products.shape[0] > 1:
        # Changes no value; but without a select between them XLA fuses products and sums into one rounding,
        # and compiled code differs from uncompiled (jax 0.10 drops an optimization_barrier too early).
        products = jnp.where(factors == 0, 0.0, products)
    y = products[0]
    for product in products[1:]:
        y = y + product
    return y
