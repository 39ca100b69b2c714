"""Weight quantizers: f(w [n, k], *, granularity, ste, scale, progress, key, ...) -> Quantized.

codes [n, k], scale [#n, G]. The conventions they share with the activation quantizers are in registry.py.
What a docstring calls "backward" is d(codes * scale)/dw times the incoming gradient g; h is the slope of the
named STE.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bitnet_jax.quantization import ste as ste_lib
from bitnet_jax.quantization.scales import (
    SMALLEST_SCALE,
    Granularity,
    Quantized,
    absmax,
    floats,
    guarded,
    learned,
    measure,
    nearest,
    nearest_odd,
    reciprocal,
    round_scaled,
    spread,
)
from bitnet_jax.quantization.ste import Progress, straight_through

# Step that minimises the error on a Gaussian, in units of its mean absolute value sigma sqrt(2 / pi).
GAUSSIAN_STEP = {
    ("midrise", 2): 0.997 * (math.pi / 2) ** 0.5,
    ("midrise", 3): 0.587 * (math.pi / 2) ** 0.5,
    ("midrise", 4): 0.335 * (math.pi / 2) ** 0.5,
    ("zero", 2): 1.045 * (math.pi / 2) ** 0.5,
    ("zero", 3): 0.606 * (math.pi / 2) ** 0.5,
    ("zero", 4): 0.340 * (math.pi / 2) ** 0.5,
}


def _float32(x: Array) -> Array:
    return floats("input of a quantizer", x).astype(jnp.float32)


def _shared_count(x: Array, scale: Array, count: str) -> int:
    """N of the LSQ factor: values per scale ("shared", LSQ) or in the whole matrix ("matrix", ParetoQ)."""
    matrix = x.shape[-1] * x.shape[-2]
    if count == "matrix":
        return matrix
    if count == "shared":
        return matrix // (scale.shape[-1] * scale.shape[-2])
    raise ValueError(f"count: got {count!r}, expected 'shared' or 'matrix'")


# --- binary weights: codes in {-1, 1}


def _binary(
    w: Array,
    centre: Array | float,
    *,
    granularity: Granularity,
    ste: str,
    scale: Array | None,
    progress: Progress,
    zero: int = 1,
    window: str = "scaled",
    scale_gradient: bool = False,
    count: str = "shared",
) -> Quantized:
    """sign(w - centre) with the scale mean|w|: the common body of the binary quantizers."""
    v = w - centre
    if scale is None:
        scale = jnp.maximum(measure(jnp.mean, jnp.abs(w), granularity), SMALLEST_SCALE)
        scale = scale if scale_gradient else jax.lax.stop_gradient(scale)
    else:
        scale = learned(_float32(scale), _shared_count(w, scale, count), 1)
    inverse = jax.lax.stop_gradient(spread(1 / scale, w.shape[-1]))
    if window == "scaled":
        slope = ste_lib.surrogate(ste, v * inverse, progress) * inverse
    elif window == "raw":
        slope = ste_lib.surrogate(ste, v, progress)
    else:
        raise ValueError(f"window: got {window!r}, expected 'scaled' or 'raw'")
    return Quantized(straight_through(ste_lib.signs(w, zero, centre), (v,), (slope,)), scale)


def binary(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    zero: int = 1,
    window: str = "scaled",
    scale_gradient: bool = False,
    count: str = "shared",
) -> Quantized:
    """Plain sign with the optimal scale mean|W| (XNOR-Net 1603.05279), or a learned one (BiT, ParetoQ).

    Forward:  codes = sign(W), sign(0) = `zero`; scale = max(mean|W|, 1e-5) or the learned s.
    Backward: window="scaled": g h(W / scale); window="raw": g scale h(W), larq's magnitude-aware sign.
              A learned s gets sum(g sign(W)) / sqrt(N); with ste="clipped", h is BiT's window |W| <= s
              (2205.13016). scale_gradient=True also differentiates mean|W| itself.
    """
    w = _float32(w)
    return _binary(
        w,
        0.0,
        granularity=granularity,
        ste=ste,
        scale=scale,
        progress=progress,
        zero=zero,
        window=window,
        scale_gradient=scale_gradient,
        count=count,
    )


def binary_centred(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    zero: int = -1,
    centre_gradient: bool = False,
    scale_gradient: bool = False,
    count: str = "shared",
) -> Quantized:
    """BitNet (2310.11453): sign of the centred weights, scale of the uncentred ones.

    Forward:  codes = sign(W - mean W), sign(0) = `zero` (-1 in the paper); scale = max(mean|W|, 1e-5).
              The mean is over the weights that share a scale (the paper's group quantization).
    Backward: g h((W - mean W) / scale); centre_gradient=True (IR-Net, BiBERT) subtracts the mean of that too.
    """
    w = _float32(w)
    mean = spread(measure(jnp.mean, w, granularity), w.shape[-1])
    return _binary(
        w,
        mean if centre_gradient else jax.lax.stop_gradient(mean),
        granularity=granularity,
        ste=ste,
        scale=scale,
        progress=progress,
        zero=zero,
        scale_gradient=scale_gradient,
        count=count,
    )


def binary_raw(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """BinaryConnect (1511.00363) and BNN (1602.02830) weights: no scale at all.

    Forward:  codes = +1 where W >= 0 else -1; scale = 1.
    Backward: g h(W). The papers use the identity and clip the latents to [-1, 1] after the update.
    With a learned scale: `binary` with window="raw".
    """
    w = _float32(w)
    if scale is not None:
        return binary(w, ste=ste, scale=scale, progress=progress, window="raw")
    return Quantized(ste_lib.sign(w, ste, progress), jnp.ones((*w.shape[:-2], 1, 1), jnp.float32))


def binary_stochastic(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """Stochastic BinaryConnect: +1 with probability clip((W + 1) / 2, 0, 1), scale 1.

    Backward: g h(W). Without a key (evaluation, packing) it is the deterministic `binary_raw`.
    """
    if key is None:
        return binary_raw(w, ste=ste, scale=scale, progress=progress)
    raw = binary_raw(w, ste=ste, scale=scale, progress=progress)
    return raw._replace(codes=ste_lib.stochastic_sign(_float32(w), key, ste, progress))


def bwn(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "channel",
    ste: str = "clipped",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """Binary-Weight-Network (XNOR-Net 1603.05279).

    Forward:  codes = sign(W), scale = max(mean|W|, 1e-5) over the n weights that share it.
    Backward: g (1/n + scale h(W)): the window is on the raw latents, and 1/n is the paper's term for the
              scale's own dependence on W (elementwise, as in the released code).
    """
    w = _float32(w)
    if scale is not None:
        return binary(w, granularity=granularity, ste=ste, scale=scale, progress=progress, window="raw")
    scale = jax.lax.stop_gradient(jnp.maximum(measure(jnp.mean, jnp.abs(w), granularity), SMALLEST_SCALE))
    share = spread(1 / (_shared_count(w, scale, "shared") * scale), w.shape[-1])
    slope = ste_lib.surrogate(ste, w, progress) + share
    return Quantized(straight_through(ste_lib.signs(w), (w,), (slope,)), scale)


def zero_one(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    count: str = "shared",
) -> Quantized:
    """Weights in {0, 1}, with which training is said to fail early (BitNet's Training Tips, FAQ).

    Forward:  codes = 1[W > 0]; scale = max(mean|W|, 1e-5) or the learned s.
    Backward: g h(W / scale), and to a learned s as in `binary`: the slopes of a sign, not half of them.
    """
    signs = _binary(
        _float32(w),
        0.0,
        granularity=granularity,
        ste=ste,
        scale=scale,
        progress=progress,
        zero=-1,
        count=count,
    )
    codes = straight_through((signs.codes + 1) * 0.5, (signs.codes,), (jnp.ones_like(signs.codes),))
    return Quantized(codes, signs.scale)


# --- several levels: codes by rounding


def _ternary(
    w: Array, statistic: Callable[..., Array], granularity: Granularity, ste: str, scale: Array | None,
    epsilon: str, eps: float, count: str, factor: float = 1.0,
) -> Quantized:  # fmt: skip
    w = _float32(w)
    if scale is not None:
        scale = learned(_float32(scale), _shared_count(w, scale, count), 1)
        return Quantized(round_scaled(w, spread(scale, w.shape[-1]), nearest(-1, 1), -1, 1, ste), scale)
    size = factor * jax.lax.stop_gradient(measure(statistic, jnp.abs(w), granularity))
    divisor, multiplier = guarded(size, eps, epsilon)
    inverse = 1 / divisor
    scale = multiplier if epsilon == "divisor" else reciprocal(inverse)
    return Quantized(ste_lib.round_to_grid(w * spread(inverse, w.shape[-1]), -1, 1, ste), scale)


def ternary_absmean(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    epsilon: str = "clamp",
    eps: float = SMALLEST_SCALE,
    count: str = "shared",
    factor: float = 1.0,
) -> Quantized:
    """BitNet b1.58 (2402.17764) in the arithmetic of the released 2B-4T checkpoint.

    Forward:  m = max(mean|W|, 1e-5), s = 1/m, codes = clip(round(W s), -1, 1), scale = 1/s. Half rounds to
              even, so half the mean becomes 0. `epsilon` is one of the published guards (scales.guarded).
              `factor` multiplies the mean: above 1 more codes are 0 (Training Tips, FAQ).
    Backward: g h, h = 1 or the window |W| <= scale; a learned scale gets LSQ's gradient.
    """
    return _ternary(w, jnp.mean, granularity, ste, scale, epsilon, eps, count, factor)


def ternary_absmedian(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    epsilon: str = "clamp",
    eps: float = SMALLEST_SCALE,
    count: str = "shared",
) -> Quantized:
    """b1.58 Reloaded (2407.09527): `ternary_absmean` with the median of |W| in place of the mean."""
    return _ternary(w, jnp.median, granularity, ste, scale, epsilon, eps, count)


def ternary_twn(
    w: Float[Array, "n k"],
    *,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    threshold: float = 0.7,
    count: str = "shared",
) -> Quantized:
    """Ternary Weight Networks: a threshold below which weights are 0, and the mean of the survivors as scale.

    Forward:  D = 0.7 mean|W|, codes = sign(W) 1[|W| > D], scale = max(mean(|W| : |W| > D), 1e-5).
    Backward: g h(W / scale), h = 1 or the window; a learned scale gets sum(g codes) / sqrt(N).
    """
    w = _float32(w)
    k = w.shape[-1]
    size = jax.lax.stop_gradient(jnp.abs(w))
    above = size > spread(threshold * measure(jnp.mean, size, granularity), k)
    # NaN explicitly: XLA makes a selection of the product with a comparison, which would drop it.
    survivors = jnp.where(jnp.isnan(size), jnp.nan, above.astype(jnp.float32))
    if scale is None:
        total = measure(jnp.sum, size * survivors, granularity)
        number = measure(jnp.sum, survivors, granularity)
        scale = jnp.maximum(total / jnp.maximum(number, 1), SMALLEST_SCALE)
    else:
        scale = learned(_float32(scale), _shared_count(w, scale, count), 1)
    inverse = jax.lax.stop_gradient(spread(1 / scale, k))
    slope = ste_lib.window(w * inverse, -1, 1, ste) * inverse
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
    *,
    bits: int,
    granularity: Granularity = "tensor",
    ste: str = "identity",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    levels: str = "zero",
    statistic: str = "absmax",
    count: str = "shared",
) -> Quantized:
    """Uniform symmetric b-bit weights; with a learned scale, LSQ (1902.08153).

    Forward:  levels="zero":    codes = clip(round(W / scale), -2^(b-1), 2^(b-1) - 1),
                                measured scale = max|W| / (2^(b-1) - 1).
              levels="midrise": no zero but odd codes, clip(2 floor(W / step) + 1, -(2^b - 1), 2^b - 1), with
                                scale = step / 2; measured step = max|W| / 2^(b-1). Cell edges go up.
              statistic="absmean": the step of least error on a Gaussian, c mean|W| (2 to 4 bits).
    Backward: g h, h = 1 or the window of the grid; a learned scale gets sum g (codes - W/scale) inside the
              grid and g (outermost code) outside, over sqrt(N Qp), Qp = 2^(b-1) - 1.
    """
    w = _float32(w)
    if scale is not None:
        scale = learned(_float32(scale), _shared_count(w, scale, count), max(2 ** (bits - 1) - 1, 1))
    else:
        scale = integer_scale(jax.lax.stop_gradient(w), bits, granularity, levels, statistic)
    return Quantized(integer_codes(w, spread(scale, w.shape[-1]), bits, levels, ste), scale)


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
        f"statistic: got {statistic!r} for {bits} bits, expected 'absmax', or 'absmean' with 2, 3 or 4 bits"
    )


def stretched_elastic(
    w: Float[Array, "n k"],
    *,
    levels: int,
    granularity: Granularity = "channel",
    ste: str = "clipped",
    scale: Float[Array, "#n G"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    count: str = "matrix",
) -> Quantized:
    """Stretched elastic quantization (SEQ) of ParetoQ (2502.02631), 3 or 4 balanced levels.

    Forward:  alpha = `scale` (measured: max|W|), c = clip(W / alpha, -0.99, 0.99).
              3 levels: alpha round(1.5 c) / 1.5                 codes -1, 0, 1       scale = alpha / 1.5
              4 levels: alpha (round(2 c - 1/2) + 1/2) / 2       codes -3, -1, 1, 3   scale = alpha / 4
              (a W / alpha on a cell edge of the 4 levels goes up; the paper's round would go to even)
    Backward: g 1[|W / alpha| <= 0.99]; to alpha sum g v / sqrt(N), where v = q - W/alpha inside, q = codes
              scale / alpha, and outside +-0.75 (4 levels) or +-1 (3 levels: more than the level 2/3, as in
              the released code).
    """
    w = _float32(w)
    if levels == 3:
        per_alpha, outside = 1.5, 1.5
        codes = nearest(-1, 1)
    elif levels == 4:
        per_alpha, outside = 4.0, 3.0
        codes = nearest_odd(3)
    else:
        raise ValueError(f"levels: got {levels}, expected 3 or 4")
    if scale is None:
        alpha = jnp.maximum(measure(absmax, jax.lax.stop_gradient(w), granularity), SMALLEST_SCALE)
    else:
        alpha = learned(_float32(scale), _shared_count(w, scale, count), 1)
    scale = alpha * (1 / per_alpha)
    limit = 0.99 * per_alpha
    rounded = round_scaled(w, spread(scale, w.shape[-1]), codes, -limit, limit, ste, (-outside, outside))
    return Quantized(rounded, scale)
