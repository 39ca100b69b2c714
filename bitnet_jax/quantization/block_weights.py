"""Weights in the arithmetic of llama.cpp's blocks: its codes, scales and minima, bit for bit.

Scales are divisions and may be zero or negative, and no floor bounds them, so these differ in the last bit from the
other integer quantizers. A matrix that came from such blocks (granularity 32, float16 scales) quantizes to itself.
Conventions are in registry.py; "Backward" as in multilevel_weights.py.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization import ste as ste_lib
from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.scales import Quantized, absmax, as_float32, measure, reciprocal, spread
from bitnet_jax.quantization.ste import straight_through


def uint4(w: Float[Array, "n k"], args: Arguments = DEFAULT) -> Quantized:
    """Asymmetric 4 bits: W ~ codes * scale + minimum; llama.cpp's Q4_1 with granularity 32.

    Forward:  minimum = min W, scale = (max W - minimum) / 15,
              codes = clip(trunc((W - minimum) / scale + 1/2), 0, 15); all codes 0 where the scale is 0.
    Backward: g; scale and minimum are measured and get none.
    Source:   ggml-quants.c of llama.cpp.
    """
    w, k = as_float32(w), w.shape[-1]
    stopped = jax.lax.stop_gradient(w)
    low = measure(_with_nan(jnp.min), stopped, args.granularity)
    scale = _quotient(measure(_with_nan(jnp.max), stopped, args.granularity) - low, 15)
    inverse = spread(_reciprocal_or_zero(scale), k)
    z = _rounded((stopped - spread(low, k)) * inverse, 0, 16)
    # A window that ends at 15 would leave out the largest weight, whose z is 15 up to rounding.
    slope = ste_lib.window(z, 0, 15.5, args.ste) * inverse
    return Quantized(straight_through(jnp.clip(jnp.trunc(z + 0.5), 0, 15), (w,), (slope,)), scale, low)


def signed(w: Float[Array, "n k"], args: Arguments, bits: int) -> Quantized:
    """The whole range of b bits: the weight of largest magnitude has the code -2^(b-1), whatever its sign."""
    half, k = 2 ** (bits - 1), w.shape[-1]
    stopped = jax.lax.stop_gradient(w)
    scale = measure(_largest, stopped, args.granularity) / -half
    inverse = spread(_reciprocal_or_zero(scale), k)
    z = _rounded(stopped * inverse, -half - 1, half + 1)
    codes = jnp.clip(jnp.trunc(z + (half + 0.5)), 0, 2 * half - 1) - half
    slope = ste_lib.window(z, -half - 0.5, half - 0.5, args.ste) * inverse
    return Quantized(straight_through(codes, (w,), (slope,)), scale)


def symmetric(w: Float[Array, "n k"], args: Arguments, bits: int) -> Quantized:
    """b bits with scale = max|W| / (2^(b-1) - 1); halves are rounded away from zero."""
    half, k = 2 ** (bits - 1), w.shape[-1]
    stopped = jax.lax.stop_gradient(w)
    scale = _quotient(measure(absmax, stopped, args.granularity), half - 1)
    inverse = spread(_reciprocal_or_zero(scale), k)
    z = _rounded(stopped * inverse, -half, half)
    whole = jnp.floor(jnp.abs(z))
    codes = jnp.sign(z) * jnp.where(jnp.abs(z) - whole >= 0.5, whole + 1, whole)
    slope = ste_lib.window(z, -half, half, args.ste) * inverse
    return Quantized(straight_through(codes, (w,), (slope,)), scale)


def _largest(
    x: Float[Array, "..."], axis: int | tuple[int, ...] = -1, keepdims: bool = False
) -> Float[Array, "..."]:
    """The first element of largest magnitude, NaN if any element is NaN; over the last axis, or over the last two."""
    if isinstance(axis, tuple):
        x = x.reshape(*x.shape[:-2], 1, -1)
    index = jnp.argmax(jnp.abs(x), axis=-1, keepdims=True)
    found = jnp.take_along_axis(x, index, axis=-1)
    return found if keepdims else found[..., 0]


def _with_nan(reduce: Callable[..., Array]) -> Callable[..., Array]:
    """A minimum or maximum that is NaN if any element is; XLA's drops NaN in large enough arrays (jax 0.10)."""

    def reduced(x: Array, axis: int | tuple[int, ...] = -1, keepdims: bool = False) -> Array:
        has_nan = jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims)
        return jnp.where(has_nan, jnp.nan, reduce(x, axis=axis, keepdims=keepdims))

    return reduced


def _quotient(x: Array, divisor: float) -> Array:
    """x / divisor, a division: XLA multiplies by the reciprocal of a constant, also behind an optimization barrier."""
    return x / jnp.where(jnp.isnan(x), x, divisor)


def _reciprocal_or_zero(scale: Array) -> Array:
    """1 / scale, and 0 for 0."""
    return jnp.where(scale == 0, 0, reciprocal(jnp.where(scale == 0, 1, scale)))


def _rounded(product: Array, low: float, high: float) -> Array:
    """A product within [low, high] that is rounded before anything is added to it.

    The bounds change no value, but without an operation in between XLA fuses product and sum into one rounding.
    """
    return jnp.clip(product, low, high)
