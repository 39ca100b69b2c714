"""The definition of every operation in plain jnp. Fast paths are tested to be bit-identical.

Axis letters: m rows of x, n outputs, k inputs, G scale groups of g = k / G inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from bitnet_kernels.dtypes import floats
from bitnet_kernels.formats import unpack
from bitnet_kernels.packed import PackedArray
from bitnet_kernels.rounding import rounded, unfused

EPSILON = 1e-5  # lower bound of the absmax of a token, as in the released BitNet b1.58 2B-4T
PEAK_16 = 127 * 256  # largest 16-bit code: its high digit is 127


def absmax(x: jax.Array, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False) -> jax.Array:
    """max|x| along axes, NaN if any element is NaN.

    jnp.max is not enough: on CPU, XLA's maximum of large enough arrays drops NaN (jax 0.10).
    """
    has_nan = jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims)
    return jnp.where(has_nan, jnp.nan, jnp.max(jnp.abs(x), axis=axis, keepdims=keepdims))


def quantize_activations(x: jax.Array, bits: int = 8) -> tuple[jax.Array, jax.Array]:
    """Absmax integers per token: x float [..., k] -> (codes int8 or int16 [..., k], scale float32 [..., 1]).

    s = peak / max(max|x|, 1e-5);  codes = clip(round(x s));  scale = 1 / s.
    8 bits: peak = 127, codes in [-128, 127]. 16 bits: peak = 127 * 256 = 32512, codes in [-peak, peak], which split
    into two int8 digits (`digits`).
    With NaN or infinity in a token all its codes are 0 and its scale is NaN or infinity, so its products are NaN.

    Raises:
      ValueError: the dtype of x is not float32, bfloat16 or float16.
    """
    x = floats("x", x).astype(jnp.float32)
    peak, low, high, dtype = {
        8: (127.0, -128, 127, jnp.int8),
        16: (float(PEAK_16), -PEAK_16, PEAK_16, jnp.int16),
    }[bits]
    s = peak / jnp.maximum(absmax(x, keepdims=True), EPSILON)
    # Without the barrier XLA rewrites 1 / (127 / max) as max * (1 / 127), which rounds differently.
    scale = 1.0 / jax.lax.optimization_barrier(s)
    codes = jnp.clip(jnp.round(x * s), low, high)
    return jnp.where(jnp.isnan(codes), 0, codes).astype(dtype), scale


def digits(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integers in [-32640, 32639] -> float32 (high, low), both in [-128, 127], with codes = 256 high + low.

    The product of 16-bit codes with a matrix is thereby two exact products of int8 codes, see `join_digits`.
    """
    codes = codes.astype(jnp.float32)
    high = jnp.floor((codes + 128) * (1 / 256))
    return high, codes - 256 * high


def join_digits(high: jax.Array, low: jax.Array) -> jax.Array:
    """256 high + low, of products with the digits: the first term is exact, so there is one rounding."""
    return high * 256 + unfused(low)


def integer_matmul(x: jax.Array, w: PackedArray) -> jax.Array:
    """int8 codes [m, k] times a packed matrix -> int32 [G, m, n], one exact sum per scale group."""
    m = x.shape[0]
    # XLA's CPU backend uses a slow loop for one int8 row.
    rows = jnp.pad(x, ((0, 1), (0, 0))) if m == 1 else x
    return _group_sums(rows, unpack(w), w.groups, jnp.int32)[:, :m]


def scaled_matmul(x: jax.Array, w: PackedArray) -> jax.Array:
    """int8 codes [m, k] times a packed matrix and its scale -> float32 [m, n]."""
    return rescale(integer_matmul(x, w), w.scale, w.minimum, group_sums(x, w, jnp.int32))


def group_sums(x: jax.Array, w: PackedArray, dtype: DTypeLike) -> jax.Array | None:
    """[G, m]: the sums of x [m, k] over the inputs of each scale group, by which a minimum is multiplied, or None."""
    if w.minimum is None:
        return None
    return jnp.sum(x.reshape(x.shape[0], w.groups, w.group_size), axis=-1, dtype=dtype).T


def scaled_matmuls(
    x: jax.Array,
    ws: Sequence[PackedArray],
    multiply: Callable[[jax.Array, PackedArray], jax.Array] = scaled_matmul,
) -> tuple[jax.Array, ...]:
    """x [m, k] times packed matrices and their scales -> float32 [m, n] for each.

    int8 x holds codes; float x is quantized to 8 bits, and its per-row scale is applied last.
    """
    if x.dtype == np.int8:
        return tuple(multiply(x, w) for w in ws)
    codes, scale = quantize_activations(x)
    return tuple(rounded_product(multiply(codes, w), scale) for w in ws)


def matmuls_of_digits(
    x: jax.Array, ws: Sequence[PackedArray], multiply: Callable[..., tuple[jax.Array, ...]] = scaled_matmuls
) -> tuple[jax.Array, ...]:
    """`scaled_matmuls` with 16-bit codes: x [m, k], int16 codes or float, becomes 2 m rows of int8 digits.

    multiply: any implementation of `scaled_matmuls` for int8 rows.
    """
    codes, scale = (x, None) if x.dtype == np.int16 else quantize_activations(x, 16)
    ys = multiply(jnp.concatenate(digits(codes)).astype(jnp.int8), ws)
    joined = tuple(join_digits(*jnp.split(y, 2)) for y in ys)
    return joined if scale is None else tuple(rounded_product(y, scale) for y in joined)


def float_matmul(x: jax.Array, w: PackedArray) -> jax.Array:
    """float [m, k] times the unpacked codes -> float32 [G, m, n]: weight-only quantization."""
    return _group_sums(
        floats("x", x).astype(jnp.float32), unpack(w).astype(jnp.float32), w.groups, jnp.float32
    )


def scaled_float_matmul(x: jax.Array, w: PackedArray) -> jax.Array:
    """float [m, k] times the unpacked codes and their scale -> float32 [m, n]."""
    x = floats("x", x).astype(jnp.float32)
    return rescale(float_matmul(x, w), w.scale, w.minimum, group_sums(x, w, jnp.float32))


def _group_sums(x: jax.Array, codes: jax.Array, groups: int, dtype: DTypeLike) -> jax.Array:
    """[G, m, n]: the products of x [m, k] and codes [n, k] for each group of inputs."""
    dot = functools.partial(jnp.einsum, precision="highest", preferred_element_type=dtype)
    if groups == 1:
        return dot("mk,nk->mn", x, codes)[None]  # a batch axis of size one would be slower
    (m, k), n = x.shape, codes.shape[0]
    return dot("mgk,ngk->gmn", x.reshape(m, groups, k // groups), codes.reshape(n, groups, k // groups))


def rescale(
    sums: jax.Array, scale: jax.Array, minimum: jax.Array | None = None, x_sums: jax.Array | None = None
) -> jax.Array:
    """Sums [G, m, n] and the scale of the matrix -> float32 [m, n]; all implementations rescale this way.

    y = t[0] + t[1] + ... in this order, t[g] = sums[g] * scale[:, g], plus x_sums[g] * minimum[:, g] where there is a
    minimum; each product and sum is rounded to float32.

    Args:
      scale, minimum: [n, G] (or [1, 1]), float32 or float16.
      x_sums: [G, m], sums of x over each group; needed with a minimum.
    """
    scale = scale.astype(jnp.float32)
    if minimum is not None and x_sums is not None:
        parts: tuple[jax.Array, ...] = (sums, scale.T, x_sums, minimum.astype(jnp.float32).T)
    elif sums.shape[0] == 1:
        return sums[0].astype(jnp.float32) * scale.T  # nothing is added that it could be fused with
    else:
        parts = (sums, scale.T)
    if sums.shape[0] == 1:
        return _term(*(part[0] for part in parts))
    # Starts from -0.0, the identity of addition: +0.0 would change a first product of -0.0.
    return jax.lax.scan(_add_group, jnp.full(sums.shape[1:], -0.0, jnp.float32), parts)[0]


def _add_group(y: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    return y + _term(*group), None


def _term(
    sums: jax.Array, scale: jax.Array, x_sums: jax.Array | None = None, minimum: jax.Array | None = None
) -> jax.Array:
    """The float32 [m, n] that one group adds: sums [m, n], scale and minimum [n], x_sums [m]."""
    product = rounded_product(sums.astype(jnp.float32), scale[None, :])
    if x_sums is None or minimum is None:
        return product
    return product + rounded_product(x_sums.astype(jnp.float32)[:, None], minimum[None, :])


@jax.custom_jvp
def rounded_product(values: jax.Array, scale: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of a product."""
    return rounded(values, scale)


@functools.partial(rounded_product.defjvp, symbolic_zeros=True)
def _rounded_product_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero]
) -> tuple[jax.Array, jax.Array]:
    # If a factor has no gradient, such as a measured scale, the backward pass need not store the other one.
    (values, scale), (d_values, d_scale) = primals, tangents
    y = rounded_product(values, scale)
    if isinstance(d_scale, SymbolicZero):
        return y, jnp.zeros_like(y) if isinstance(d_values, SymbolicZero) else d_values * scale
    if isinstance(d_values, SymbolicZero):
        return y, values * d_scale
    return y, d_values * scale + values * d_scale
