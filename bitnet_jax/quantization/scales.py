"""Scales of quantized arrays: their shape, measurement and learning.

A scale has the rank of its codes. Leading axes broadcast; the last axis has length 1, or G for G groups of k / G
consecutive elements of the contraction axis. For a weight matrix [n, k] the granularities are

    "tensor"   one number            [1, 1]
    "channel"  one per output        [n, 1]
    g (int)    one per g inputs      [n, k / g]

Scales are always applied by multiplication, `w * (1 / scale)`, never `w / scale`: XLA rewrites a division by a
broadcast value into the multiplication, and codes would then differ between compiled and uncompiled quantizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization import ste as ste_lib

Granularity = Literal["tensor", "channel"] | int
SMALLEST_SCALE = 1e-5  # the clamp of the released BitNet code, and the floor of every learned scale


class Quantized(NamedTuple):
    """Integer-valued float32 codes and their float32 scale: array = codes * scale (+ minimum, if there is one).

    Sums of products of codes are exact in float32 below 2^24, in any order of summation, so a packed integer matmul
    can be bit-identical to the one in training. The only exceptions are `unquantized` activations, whose codes are the
    input itself, with scale 1.
    """

    codes: Float[Array, "... k"]
    scale: Float[Array, "... G"]
    minimum: Float[Array, "... G"] | None = None  # of asymmetric weight quantizers

    def dequantize(self) -> Float[Array, "... k"]:
        k = self.codes.shape[-1]
        array = self.codes * spread(self.scale, k)
        return array if self.minimum is None else array + spread(self.minimum, k)


FLOATS = ("float32", "bfloat16", "float16")


def floats(name: str, x: Array) -> Array:
    """x as a JAX array with a dtype in FLOATS; `name` identifies it in the error. Kernels have the same rule.

    Raises:
      ValueError: x has another dtype.
    """
    array = jnp.asarray(x)
    if array.dtype.name not in FLOATS:
        raise ValueError(f"{name} is {array.dtype}; expected {', '.join(FLOATS[:-1])} or {FLOATS[-1]}")
    return array


def as_float32(x: Array) -> Float[Array, "..."]:
    """x as float32, in which quantizers compute. ValueError if the dtype of x is not in FLOATS."""
    return floats("input of a quantizer", x).astype(jnp.float32)


def absmax(
    x: Float[Array, "..."], axis: int | tuple[int, ...] | None = -1, keepdims: bool = False
) -> Float[Array, "..."]:
    """max|x| along axes, NaN if any element is NaN.

    jnp.max is not enough: on CPU, XLA's maximum of large enough arrays drops NaN (jax 0.10).
    """
    has_nan = jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims)
    return jnp.where(has_nan, jnp.nan, jnp.max(jnp.abs(x), axis=axis, keepdims=keepdims))


def spread(scale: Float[Array, "... G"], k: int) -> Float[Array, "... k"]:
    """Repeats each group's scale over its k / G inputs; a last axis of 1 is returned as is, to broadcast."""
    groups = scale.shape[-1]
    if groups == 1:
        return scale
    if k % groups:
        raise ValueError(f"scale groups: got {groups} along an axis of {k}, expected a divisor of {k}")
    return jnp.repeat(scale, k // groups, axis=-1)


def measure(
    statistic: Callable[..., Array], w: Float[Array, "... k"], granularity: Granularity
) -> Float[Array, "... G"]:
    """Applies a reduction such as jnp.mean(values, axis, keepdims) over the weights that share a scale.

    The result is [..., n, G] for w [..., n, k], or [..., 1, 1] for one scale per matrix ("tensor").

    The barrier keeps XLA from merging the 1/n of a mean with a later constant factor, which would change the rounding
    in compiled code.
    """
    k = w.shape[-1]
    if granularity == "tensor":
        measured = statistic(w, axis=(-2, -1), keepdims=True)
    elif granularity == "channel":
        measured = statistic(w, axis=-1, keepdims=True)
    elif isinstance(granularity, int) and granularity > 0 and k % granularity == 0:
        measured = statistic(w.reshape(*w.shape[:-1], k // granularity, granularity), axis=-1)
    else:
        raise ValueError(
            f"granularity: got {granularity!r} for weights with {k} inputs, "
            f"expected 'tensor', 'channel' or a group size that divides {k}"
        )
    return jax.lax.optimization_barrier(measured)


def reciprocal(scale: Array) -> Array:
    """1 / scale, protected from XLA, which would simplify 1 / (1 / m) to m, an ulp off the uncompiled value."""
    return 1 / jax.lax.optimization_barrier(scale)


FLOAT16_MAX = 65504.0


def float16_values(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 x rounded to the nearest float16, half to even; beyond FLOAT16_MAX infinity. Gradient: as if not rounded.

    Equal to x.astype(float16).astype(float32), a pair of conversions that XLA removes; lax.reduce_precision makes
    subnormal numbers zero.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 13) & jnp.uint32(1)
    kept = (bits + jnp.uint32(0xFFF) + odd) & jnp.uint32(0xFFFFE000)
    size = jnp.abs(x)
    value = jax.lax.bitcast_convert_type(kept, jnp.float32)
    value = jnp.where(size < 2.0**-14, jnp.round(x * 2.0**24) * 2.0**-24, value)
    value = jnp.where(jnp.abs(value) > FLOAT16_MAX, jnp.sign(x) * jnp.inf, value)
    value = jnp.where(jnp.isnan(x), x, value)
    return ste_lib.straight_through(value, (x,), (jnp.ones_like(x),))


def guarded(value: Array, eps: float, epsilon: str) -> tuple[Array, Array]:
    """(divisor, multiplier) of a measured scale for the three published placements of epsilon.

    "clamp"    max(value, eps) in both places: the released BitNet code
    "add"      value + eps in both: TriLM (2407.12327)
    "divisor"  value + eps where the input is divided, value where codes are multiplied: b1.58 (2402.17764)
    """
    if epsilon == "clamp":
        return jnp.maximum(value, eps), jnp.maximum(value, eps)
    if epsilon == "add":
        return value + eps, value + eps
    if epsilon == "divisor":
        return value + eps, value
    raise ValueError(f"epsilon: got {epsilon!r}, expected 'clamp', 'add' or 'divisor'")


def learned(scale: Float[Array, "..."], count: int, q_max: float) -> Float[Array, "..."]:
    """A learned scale with its floor and its gradient factor.

    Forward:  max(scale, 1e-5).
    Backward: g / sqrt(count * q_max), the step-size gradient factor of LSQ (1902.08153). It is not zeroed at the
              floor, so a scale that reached it can recover.

    `count` is the number of values that share the scale, `q_max` the largest code.
    """
    factor = jnp.full_like(scale, 1 / (count * q_max) ** 0.5)
    return ste_lib.straight_through(jnp.maximum(scale, SMALLEST_SCALE), (scale,), (factor,))


def shared_count(w: Float[Array, "... n k"], scale: Float[Array, "... #n G"], count: str) -> int:
    """`count` for `learned`: weights per scale ("shared", LSQ) or in the whole matrix ("matrix", ParetoQ)."""
    matrix = w.shape[-1] * w.shape[-2]
    if count == "matrix":
        return matrix
    if count == "shared":
        return matrix // (scale.shape[-1] * scale.shape[-2])
    raise ValueError(f"count: got {count!r}, expected 'shared' or 'matrix'")


def nearest(low: int, high: int) -> Callable[[Array], Array]:
    """z -> clip(round(z), low, high); half rounds to even."""
    return lambda z: jnp.clip(jnp.round(z), low, high)


def nearest_odd(highest: int) -> Callable[[Array], Array]:
    """z -> the odd code c of the cell [c - 1, c + 1) that contains z, within +-highest.

    Uses floor, not round(z/2 - 1/2): with a fused multiply-add that could round differently.
    """
    return lambda z: jnp.clip(2 * jnp.floor(z * 0.5) + 1, -highest, highest)


def round_scaled(
    x: Array,
    scale: Array,
    codes: Callable[[Array], Array],
    low: float,
    high: float,
    ste: str,
    edge: tuple[float, float] | None = None,
) -> Array:
    """Codes of x under a learned scale, with LSQ's gradients (1902.08153).

    Forward:  codes(z), z = x / scale.
    Backward: to x, g h with h = 1 (identity) or 1[low <= z <= high] (clipped; LSQ's window is open, which
              differs only at the two end points);
              to scale, g (codes - z) inside [low, high] and g edge outside (default: the outermost codes).
    """
    stopped, scale_stopped = jax.lax.stop_gradient(x), jax.lax.stop_gradient(scale)
    inverse = jnp.broadcast_to(1 / scale_stopped, x.shape)
    z = stopped * inverse
    value = codes(z)
    inside = ste_lib.window(z, low, high, "clipped")
    outside = value if edge is None else jnp.where(z < 0, edge[0], edge[1])
    scale_slope = jnp.where(inside > 0, value - z, outside)  # d(codes * scale) / dscale
    slopes = (ste_lib.window(z, low, high, ste) * inverse, (scale_slope - value) * inverse)
    return ste_lib.straight_through(value, (x, jnp.broadcast_to(scale, x.shape)), slopes)
