"""Activation quantizers: f(x [..., k], args, *, options) -> codes [..., k], scale [..., 1].

One scale per token (last axis), measured, or learned as one scalar per quantizer. All codes except those of
`unquantized` fit in int8, those of int16 as two digits. Conventions shared by all quantizers are in registry.py.
"Backward" is d(codes * scale)/dx times the incoming gradient g; h is the slope of the STE named by `args`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization import ste as ste_lib
from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.multilevel_weights import integer_codes, integer_scale
from bitnet_jax.quantization.scales import (
    SMALLEST_SCALE,
    Quantized,
    absmax,
    as_float32,
    guarded,
    learned,
    measure,
    reciprocal,
    round_scaled,
)
from bitnet_jax.quantization.ste import straight_through

PEAK_16 = 127 * 256  # largest code of int16: the high one of its two int8 digits is 127


def _ones(x: Array) -> Array:
    return jnp.ones((*x.shape[:-1], 1), jnp.float32)


def _mean_abs(x: Array) -> Array:
    return measure(jnp.mean, jnp.abs(jax.lax.stop_gradient(x)), "channel")


def _shifted(x: Array, shift: Array | None) -> Array:
    """x minus a learned per-feature threshold; the gradient to the threshold is minus that to x."""
    x = as_float32(x)
    return x if shift is None else x - as_float32(shift).reshape((1,) * (x.ndim - 1) + (x.shape[-1],))


def _per_token(scale: Array, x: Array, q_max: float) -> Array:
    """Broadcasts a learned scalar to [..., 1]; N in its LSQ factor is the number of features."""
    scale = learned(as_float32(scale), x.shape[-1], q_max)
    return jnp.broadcast_to(scale.reshape((1,) * x.ndim), (*x.shape[:-1], 1))


def unquantized(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """The unquantized input, for weight-only recipes.

    Forward:  codes = x, scale = 1.
    Backward: g.
    Source:   none (identity).
    """
    return Quantized(as_float32(x), _ones(x))


def int8(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
    *,
    peak: int = 127,
    per: str = "token",
    epsilon: str = "clamp",
    eps: float = SMALLEST_SCALE,
) -> Quantized:
    """Absmax int8, in the arithmetic of the released 2B-4T checkpoint.

    Forward:  s = 127 / max(max|x|, 1e-5), codes = clip(round(x s), -128, 127), scale = 1/s.
              peak=128 is the range of the first BitNet paper (2310.11453; codes still end at 127) and
              per="tensor" its scale in training. Learned scale: codes = clip(round(x / scale), -128, 127).
    Backward: g h, h = 1 or the window between the outermost codes; a learned scale as in `integer`, N = k.
    Source:   BitNet b1.58 (2402.17764) and BitNet (2310.11453); LSQ (1902.08153) for the learned scale.
    """
    x = as_float32(x)
    if args.scale is not None:
        return _lsq(x, 8, args.scale, args.ste)
    if per not in ("token", "tensor"):
        raise ValueError(f"per: got {per!r}, expected 'token' or 'tensor'")
    size = absmax(jax.lax.stop_gradient(x), axis=-1 if per == "token" else None, keepdims=True)
    divisor, multiplier = guarded(size, eps, epsilon)
    s = peak / divisor
    scale = multiplier * (1 / peak) if epsilon == "divisor" else reciprocal(s)
    codes = ste_lib.round_to_grid(x * s, -128, 127, args.ste)
    return Quantized(codes, jnp.broadcast_to(scale, (*x.shape[:-1], 1)))


def int16(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """Absmax 16-bit integers, for weight-only recipes whose products stay exact and fast.

    Forward:  s = 32512 / max(max|x|, 1e-5), codes = round(x s), scale = 1/s. Kernels multiply the two digits of
              codes = 256 high + low as int8.
    Backward: g h, h = 1 or the window between the outermost codes.
    Source:   none; a token keeps 15 bits below its largest value, where bfloat16 keeps 8 below each value.
    """
    x = as_float32(x)
    s = PEAK_16 / jnp.maximum(absmax(jax.lax.stop_gradient(x), keepdims=True), SMALLEST_SCALE)
    return Quantized(ste_lib.round_to_grid(x * s, -PEAK_16, PEAK_16, args.ste), reciprocal(s))


def _lsq(x: Array, bits: int, scale: Array, ste: str, levels: str = "zero") -> Quantized:
    """LSQ activations: grids and gradients of multilevel_weights.integer, with N = k."""
    scale = _per_token(scale, x, max(2 ** (bits - 1) - 1, 1))
    return Quantized(integer_codes(x, scale, bits, levels, ste), scale)


def int4(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
    *,
    multiplier: float = 1.0,
    eps: float = SMALLEST_SCALE,
) -> Quantized:
    """Absmean int4.

    Forward:  b = multiplier mean|x| (2 for heavy tails), codes = clip(round(sqrt(7) x / (b + eps)), -8, 7),
              scale = b / sqrt(7). With a learned scale, LSQ.
    Backward: g h b / (b + eps), h = 1 or the window.
    Source:   BitNet a4.8 (2411.04965) and BitNet v2 (2504.18415).
    """
    x = as_float32(x)
    if args.scale is not None:
        return _lsq(x, 4, args.scale, args.ste)
    size = multiplier * _mean_abs(x)
    root = 7**0.5
    return Quantized(ste_lib.round_to_grid(x * (root / (size + eps)), -8, 7, args.ste), size * (1 / root))


def int2(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """Two bits without a zero level: codes -3, -1, 1, 3.

    Forward:  codes = clip(2 floor(x / step) + 1, -3, 3), scale = step / 2; the measured step is 1.25 mean|x|
              per token, which minimizes the error on a Gaussian.
    Backward: g h, h = 1 or the window |x| <= 2 step; a learned scale as in `integer`, N = k.
    Source:   LSQ (1902.08153) for the learned scale.
    """
    x = as_float32(x)
    if args.scale is not None:
        return _lsq(x, 2, args.scale, args.ste, "midrise")
    measured = integer_scale(jax.lax.stop_gradient(x), 2, "channel", "midrise", "absmean")
    return Quantized(integer_codes(x, measured, 2, "midrise", args.ste), measured)


def sign(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """Unscaled signs; with a learned shift, RSign.

    Forward:  codes = +1 where x >= shift else -1, scale = 1.
    Backward: g h(x - shift) to x, minus that to the shift.
    Source:   BNN (1602.02830); ReActNet (2003.03488) for the shift.
    """
    return Quantized(ste_lib.sign(_shifted(x, args.shift), args.ste, args.progress), _ones(x))


def sign_absmean(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """Signs with the optimal scale mean|x| per token.

    Forward:  codes = +1 where x >= shift else -1, scale = mean|x - shift|.
    Backward: g scale h(x - shift) to x, minus that to the shift.
    Source:   XNOR-Net (1603.05279).
    """
    x = _shifted(x, args.shift)
    return Quantized(ste_lib.sign(x, args.ste, args.progress), _mean_abs(x))


def boolean(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """{0, 1} codes for non-negative tensors.

    Forward:  codes = 1[x > shift], scale = 1.
    Backward: g h(x - shift) to x, minus that to the shift.
    Source:   larq's Heaviside step.
    """
    return Quantized(ste_lib.heaviside(_shifted(x, args.shift), args.ste, args.progress), _ones(x))


def elastic_signed(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """Elastic sign for tensors of both signs: learned scale a and per-feature threshold b.

    Forward:  codes = sign((x - b) / a), scale = a.
    Backward: g h((x - b) / a) to x, with ste="clipped" (the paper's) the window |x - b| <= a; minus that to b;
              sum(g sign(x - b)) / sqrt(k) to a.
    Source:   BiT (2205.13016).
    """
    scale = _required(args.scale, "elastic_signed")
    x = _shifted(x, args.shift)
    a = _per_token(scale, x, 1)
    inverse = jax.lax.stop_gradient(1 / a)
    slope = ste_lib.surrogate(args.ste, x * inverse, args.progress) * inverse
    return Quantized(straight_through(ste_lib.signs(x), (x,), (slope,)), a)


def elastic_unsigned(
    x: Float[Array, "... k"],
    args: Arguments = DEFAULT,
) -> Quantized:
    """Elastic {0, a} for non-negative tensors: ReLU outputs, attention probabilities.

    Forward:  codes = round(clip(z, 0, 1)), z = (x - b) / a, scale = a; exactly half rounds to 0.
    Backward: g h to x, with ste="clipped" (the paper's) the window 0 <= z <= 1; minus that to b;
              to a, over sqrt(k), the sum of g (round(z) - z) inside the window, g above, 0 below.
    Source:   BiT (2205.13016).
    """
    scale = _required(args.scale, "elastic_unsigned")
    x = _shifted(x, args.shift)
    a = _per_token(scale, x, 1)
    return Quantized(round_scaled(x, a, lambda z: jnp.round(jnp.clip(z, 0, 1)), 0, 1, args.ste), a)


def _required(scale: Array | None, name: str) -> Array:
    if scale is None:
        raise ValueError(f"{name}: got no scale, expected a learned one; set activation_scale='learned'")
    return scale
