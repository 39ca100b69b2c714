"""Weight quantizers with three or more levels (codes by rounding): f(w [n, k], args, *, options) -> codes, scale.

Conventions shared by all quantizers are in registry.py. "Backward" is d(codes * scale)/dw times the incoming
gradient g; h is the slope of the STE named by `args`: 1 ("identity") or a window ("clipped").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization import block_weights
from bitnet_jax.quantization import ste as ste_lib
from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.scales import (
    SMALLEST_SCALE,
    Granularity,
    Quantized,
    absmax,
    as_float32,
    guarded,
    learned,
    measure,
    nearest,
    nearest_odd,
    reciprocal,
    round_scaled,
    shared_count,
    spread,
)
from bitnet_jax.quantization.ste import straight_through

# Step that minimizes the error on a Gaussian, in units of its mean absolute value sigma sqrt(2 / pi).
GAUSSIAN_STEP = {
    ("midrise", 2): 0.997 * (math.pi / 2) ** 0.5,
    ("midrise", 3): 0.587 * (math.pi / 2) ** 0.5,
    ("midrise", 4): 0.335 * (math.pi / 2) ** 0.5,
    ("zero", 2): 1.045 * (math.pi / 2) ** 0.5,
    ("zero", 3): 0.606 * (math.pi / 2) ** 0.5,
    ("zero", 4): 0.340 * (math.pi / 2) ** 0.5,
}


def _ternary(
    w: Array,
    statistic: Callable[..., Array],
    args: Arguments,
    *,
    epsilon: str,
    eps: float,
    count: str,
    factor: float = 1.0,
) -> Quantized:
    w = as_float32(w)
    if args.scale is not None:
        scale = learned(as_float32(args.scale), shared_count(w, args.scale, count), 1)
        return Quantized(round_scaled(w, spread(scale, w.shape[-1]), nearest(-1, 1), -1, 1, args.ste), scale)
    size = factor * jax.lax.stop_gradient(measure(statistic, jnp.abs(w), args.granularity))
    divisor, multiplier = guarded(size, eps, epsilon)
    inverse = 1 / divisor
    scale = multiplier if epsilon == "divisor" else reciprocal(inverse)
    return Quantized(ste_lib.round_to_grid(w * spread(inverse, w.shape[-1]), -1, 1, args.ste), scale)


def ternary_absmean(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    epsilon: str = "clamp",
    eps: float = SMALLEST_SCALE,
    count: str = "shared",
    factor: float = 1.0,
) -> Quantized:
    """BitNet b1.58 in the arithmetic of the released 2B-4T checkpoint.

    Forward:  m = max(mean|W|, 1e-5), s = 1/m, codes = clip(round(W s), -1, 1), scale = 1/s. Half rounds to
              even, so |W| = m/2 becomes 0. `epsilon` selects a published guard (scales.guarded).
              `factor` multiplies the mean: above 1, more codes are 0 (Training Tips, FAQ).
    Backward: g h, h = 1 or the window |W| <= scale; a learned scale gets LSQ's gradient.
    Source:   BitNet b1.58 (2402.17764).
    """
    return _ternary(w, jnp.mean, args, epsilon=epsilon, eps=eps, count=count, factor=factor)


def ternary_absmedian(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    epsilon: str = "clamp",
    eps: float = SMALLEST_SCALE,
    count: str = "shared",
) -> Quantized:
    """`ternary_absmean` with the median of |W| in place of the mean.

    Forward:  m = max(median|W|, 1e-5), s = 1/m, codes = clip(round(W s), -1, 1), scale = 1/s.
    Backward: g h, h = 1 or the window |W| <= scale; a learned scale gets LSQ's gradient.
    Source:   b1.58 Reloaded (2407.09527).
    """
    return _ternary(w, jnp.median, args, epsilon=epsilon, eps=eps, count=count)


def ternary_twn(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    threshold: float = 0.7,
    count: str = "shared",
) -> Quantized:
    """Weights below a threshold become 0; the scale is the mean magnitude of the others.

    Forward:  D = 0.7 mean|W|, codes = sign(W) 1[|W| > D], scale = max(mean(|W| : |W| > D), 1e-5).
    Backward: g h(W / scale), h = 1 or the window; a learned scale gets sum(g codes) / sqrt(N).
    Source:   Ternary Weight Networks (1605.04711).
    """
    w = as_float32(w)
    k = w.shape[-1]
    size = jax.lax.stop_gradient(jnp.abs(w))
    above = size > spread(threshold * measure(jnp.mean, size, args.granularity), k)
    # Explicit NaN: XLA rewrites a product with a comparison as a select, which would drop it.
    survivors = jnp.where(jnp.isnan(size), jnp.nan, above.astype(jnp.float32))
    if args.scale is None:
        total = measure(jnp.sum, size * survivors, args.granularity)
        number = measure(jnp.sum, survivors, args.granularity)
        scale = jnp.maximum(total / jnp.maximum(number, 1), SMALLEST_SCALE)
    else:
        scale = learned(as_float32(args.scale), shared_count(w, args.scale, count), 1)
    inverse = jax.lax.stop_gradient(spread(1 / scale, k))
    slope = ste_lib.window(w * inverse, -1, 1, args.ste) * inverse
    return Quantized(straight_through(ste_lib.signs(w) * survivors, (w,), (slope,)), scale)


def integer_codes(x: Array, scale: Array, bits: int, levels: str, ste: str) -> Array:
    """Codes of the b-bit grids of `integer` with LSQ's gradients; scale broadcasts to x."""
    half = 2 ** (bits - 1)
    if levels == "zero":
        return round_scaled(x, scale, nearest(-half, half - 1), -half, half - 1, ste)
    if levels == "midrise":
        return round_scaled(x, scale, nearest_odd(2 * half - 1), -2 * half, 2 * half, ste)
    raise ValueError(f"levels: got {levels!r}, expected 'zero' or 'midrise'")


def integer(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    bits: int,
    levels: str = "zero",
    statistic: str = "absmax",
    rounding: str = "even",
    count: str = "shared",
) -> Quantized:
    """Uniform symmetric b-bit weights; with a learned scale, LSQ.

    Forward:  levels="zero":    codes = clip(round(W / scale), -2^(b-1), 2^(b-1) - 1),
                                measured scale = max|W| / (2^(b-1) - 1).
              levels="midrise": no zero, odd codes clip(2 floor(W / step) + 1, -(2^b - 1), 2^b - 1), scale =
                                step / 2; measured step = max|W| / 2^(b-1). Cell edges round up.
              statistic="absmean": the step that minimizes the error on a Gaussian, c mean|W| (2-4 bits).
              statistic="signed": scale = (the weight of largest magnitude) / -2^(b-1), which may be negative,
                                codes = clip(trunc(W / scale + 2^(b-1) + 1/2), 0, 2^b - 1) - 2^(b-1); with 4 bits
                                and granularity 32 llama.cpp's Q4_0.
              rounding="away":  halves away from zero and a scale without a floor; with 8 bits and granularity 32
                                llama.cpp's Q8_0.
    Backward: g h, h = 1 or the window of the grid; a learned scale gets sum g (codes - W/scale) inside the
              grid and g (outermost code) outside, over sqrt(N Qp), Qp = 2^(b-1) - 1.
    Source:   LSQ (1902.08153) for the learned scale and its gradients; ggml-quants.c of llama.cpp.
    """
    w = as_float32(w)
    if rounding not in ("even", "away"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'even' or 'away'")
    if statistic == "signed" or rounding == "away":
        plain = {"levels": (levels, "zero"), "learned scale": (args.scale is not None, False)}
        plain |= {"statistic": (statistic, "absmax")} if rounding == "away" else {}
        for name, (got, wanted) in plain.items():
            if got != wanted:
                raise ValueError(
                    f"{name}: got {got!r} with statistic={statistic!r}, rounding={rounding!r}, expected {wanted!r}"
                )
        return (
            block_weights.signed(w, args, bits)
            if rounding == "even"
            else block_weights.symmetric(w, args, bits)
        )
    if args.scale is not None:
        scale = learned(
            as_float32(args.scale), shared_count(w, args.scale, count), max(2 ** (bits - 1) - 1, 1)
        )
    else:
        scale = integer_scale(jax.lax.stop_gradient(w), bits, args.granularity, levels, statistic)
    return Quantized(integer_codes(w, spread(scale, w.shape[-1]), bits, levels, args.ste), scale)


def int2(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    levels: str = "midrise",
    statistic: str = "absmean",
    count: str = "shared",
) -> Quantized:
    """Two bits without a zero level, with the step that minimizes the error on a Gaussian; see `integer`.

    Forward:  codes = clip(2 floor(W / step) + 1, -3, 3), scale = step / 2, measured step = 1.25 mean|W|.
    Backward: as in `integer`, Qp = 1.
    Source:   LSQ (1902.08153) for the learned scale and its gradients.
    """
    return integer(w, args, bits=2, levels=levels, statistic=statistic, count=count)


def integer_scale(w: Array, bits: int, granularity: Granularity, levels: str, statistic: str) -> Array:
    """The measured scale of `integer`."""
    half = 2 ** (bits - 1)
    unit = 0.5 if levels == "midrise" else 1.0
    if statistic == "absmax":
        steps = half if levels == "midrise" else half - 1
        return jnp.maximum(measure(absmax, w, granularity), SMALLEST_SCALE) * (unit / steps)
    if statistic == "absmean" and (levels, bits) in GAUSSIAN_STEP:
        mean = jnp.maximum(measure(jnp.mean, jnp.abs(w), granularity), SMALLEST_SCALE)
        return mean * (unit * GAUSSIAN_STEP[levels, bits])
    raise ValueError(
        f"statistic: got {statistic!r} for {bits} bits, expected 'absmax', 'signed', or 'absmean' with 2, 3 or 4 bits"
    )


def stretched_elastic(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    levels: int,
    count: str = "matrix",
) -> Quantized:
    """Stretched elastic quantization (SEQ) with 3 or 4 balanced levels.

    Forward:  alpha = the learned scale (measured: max|W|), c = clip(W / alpha, -0.99, 0.99).
              3 levels: alpha round(1.5 c) / 1.5                 codes -1, 0, 1       scale = alpha / 1.5
              4 levels: alpha (round(2 c - 1/2) + 1/2) / 2       codes -3, -1, 1, 3   scale = alpha / 4
              (with 4 levels, W / alpha on a cell edge rounds up; the paper rounds half to even)
    Backward: g, with ste="clipped" (the paper's) g 1[|W / alpha| <= 0.99]; to alpha sum g v / sqrt(N), where
              v = q - W/alpha inside, q = codes scale / alpha, and outside +-0.75 (4 levels) or +-1 (3 levels:
              more than the level 2/3, as in the released code).
    Source:   ParetoQ (2502.02631).
    """
    w = as_float32(w)
    if levels == 3:
        per_alpha, outside = 1.5, 1.5
        codes = nearest(-1, 1)
    elif levels == 4:
        per_alpha, outside = 4.0, 3.0
        codes = nearest_odd(3)
    else:
        raise ValueError(f"levels: got {levels}, expected 3 or 4")
    if args.scale is None:
        alpha = jnp.maximum(measure(absmax, jax.lax.stop_gradient(w), args.granularity), SMALLEST_SCALE)
    else:
        alpha = learned(as_float32(args.scale), shared_count(w, args.scale, count), 1)
    scale = alpha * (1 / per_alpha)
    limit = 0.99 * per_alpha
    rounded = round_scaled(w, spread(scale, w.shape[-1]), codes, -limit, limit, args.ste, (-outside, outside))
    return Quantized(rounded, scale)
