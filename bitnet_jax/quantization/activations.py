"""Activation quantizers: f(x [..., k], *, ste, scale, shift, progress, key, ...) -> Quantized.

codes [..., k], scale [..., 1]: one scale per token (last axis), measured, or learned as one scalar per
quantizer. All codes but those of `unquantized` fit in int8. The conventions they share with the weight
quantizers are in registry.py. "Backward" is d(codes * scale)/dx times the incoming gradient g; h is the
slope of the named STE.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bitnet_jax.quantization import ste as ste_lib
from bitnet_jax.quantization.scales import (
    SMALLEST_SCALE,
    Quantized,
    absmax,
    floats,
    guarded,
    learned,
    measure,
    reciprocal,
    round_scaled,
)
from bitnet_jax.quantization.ste import Progress, straight_through
from bitnet_jax.quantization.weights import integer_codes, integer_scale

TOP_K_STES = ("identity", "masked")


def _float32(x: Array) -> Array:
    return floats("input of a quantizer", x).astype(jnp.float32)


def _ones(x: Array) -> Array:
    return jnp.ones((*x.shape[:-1], 1), jnp.float32)


def _mean_abs(x: Array) -> Array:
    return measure(jnp.mean, jnp.abs(jax.lax.stop_gradient(x)), "channel")


def _shifted(x: Array, shift: Array | None) -> Array:
    """x minus a learned per-feature threshold, whose gradient is minus the one to x."""
    x = _float32(x)
    return x if shift is None else x - _float32(shift).reshape((1,) * (x.ndim - 1) + (x.shape[-1],))


def _per_token(scale: Array, x: Array, q_max: float) -> Array:
    """A learned scalar as [..., 1]; the N of its LSQ factor is the number of features."""
    scale = learned(_float32(scale), x.shape[-1], q_max)
    return jnp.broadcast_to(scale.reshape((1,) * x.ndim), (*x.shape[:-1], 1))


def unquantized(
    x: Float[Array, "... k"],
    *,
    ste: str = "identity",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """Weight-only recipes: codes = x, scale = 1. Backward: g."""
    return Quantized(_float32(x), _ones(x))


def int8(
    x: Float[Array, "... k"],
    *,
    ste: str = "identity",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    peak: int = 127,
    per: str = "token",
    epsilon: str = "clamp",
    eps: float = SMALLEST_SCALE,
) -> Quantized:
    """Absmax int8, in the arithmetic of the released 2B-4T checkpoint.

    Forward:  s = 127 / max(max|x|, 1e-5), codes = clip(round(x s), -128, 127), scale = 1/s.
              peak=128 is the range of the first BitNet paper (2310.11453; codes still end at 127) and
              per="tensor" its scale while training. Learned scale: codes = clip(round(x / scale), -128, 127).
    Backward: g h, h = 1 or the window of the end codes; a learned scale as in `integer`, N = k.
    """
    x = _float32(x)
    if scale is not None:
        return _lsq(x, 8, scale, ste)
    if per not in ("token", "tensor"):
        raise ValueError(f"per: got {per!r}, expected 'token' or 'tensor'")
    size = absmax(jax.lax.stop_gradient(x), axis=-1 if per == "token" else None, keepdims=True)
    divisor, multiplier = guarded(size, eps, epsilon)
    s = peak / divisor
    scale = multiplier * (1 / peak) if epsilon == "divisor" else reciprocal(s)
    codes = ste_lib.round_to_grid(x * s, -128, 127, ste)
    return Quantized(codes, jnp.broadcast_to(scale, (*x.shape[:-1], 1)))


def _lsq(x: Array, bits: int, scale: Array, ste: str, levels: str = "zero") -> Quantized:
    """Learned-step activations: the grids and gradients of weight_quantizers.integer, N = k."""
    scale = _per_token(scale, x, max(2 ** (bits - 1) - 1, 1))
    return Quantized(integer_codes(x, scale, bits, levels, ste), scale)


def int4(
    x: Float[Array, "... k"],
    *,
    ste: str = "identity",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
    multiplier: float = 1.0,
    eps: float = SMALLEST_SCALE,
) -> Quantized:
    """Absmean int4 of BitNet a4.8 (2411.04965) and v2 (2504.18415).

    Forward:  b = multiplier mean|x| (2 for heavy tails), codes = clip(round(sqrt(7) x / (b + eps)), -8, 7),
              scale = b / sqrt(7). With a learned scale, LSQ.
    Backward: g h b / (b + eps), h = 1 or the window.
    """
    x = _float32(x)
    if scale is not None:
        return _lsq(x, 4, scale, ste)
    size = multiplier * _mean_abs(x)
    root = 7**0.5
    return Quantized(ste_lib.round_to_grid(x * (root / (size + eps)), -8, 7, ste), size * (1 / root))


def int2(
    x: Float[Array, "... k"],
    *,
    ste: str = "identity",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """Two bits without a zero: codes -3, -1, 1, 3.

    Formulas: weight_quantizers.integer with levels="midrise"; the step is 1.25 mean|x| per token, best for a
    Gaussian, or learned (LSQ, N = k).
    """
    x = _float32(x)
    if scale is not None:
        return _lsq(x, 2, scale, ste, "midrise")
    measured = integer_scale(jax.lax.stop_gradient(x), 2, "channel", "midrise", "absmean")
    return Quantized(integer_codes(x, measured, 2, "midrise", ste), measured)


def sign(
    x: Float[Array, "... k"],
    *,
    ste: str = "clipped",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """BNN (1602.02830) activations, and ReActNet's RSign (2003.03488) with a learned shift.

    Forward:  codes = +1 where x >= shift else -1, scale = 1.
    Backward: g h(x - shift) to x, minus that to the shift.
    """
    return Quantized(ste_lib.sign(_shifted(x, shift), ste, progress), _ones(x))


def sign_absmean(
    x: Float[Array, "... k"],
    *,
    ste: str = "clipped",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """XNOR-Net (1603.05279) inputs: sign, with the optimal scale mean|x| per token.

    Forward:  codes = +1 where x >= shift else -1, scale = mean|x - shift|.
    Backward: g scale h(x - shift) to x, minus that to the shift.
    """
    x = _shifted(x, shift)
    return Quantized(ste_lib.sign(x, ste, progress), _mean_abs(x))


def boolean(
    x: Float[Array, "... k"],
    *,
    ste: str = "clipped",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """{0, 1} codes for non-negative tensors (larq's Heaviside).

    Forward:  codes = 1[x > shift], scale = 1.
    Backward: g h(x - shift) to x, minus that to the shift.
    """
    return Quantized(ste_lib.heaviside(_shifted(x, shift), ste, progress), _ones(x))


def elastic_signed(
    x: Float[Array, "... k"],
    *,
    ste: str = "clipped",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """BiT's elastic sign (2205.13016) for tensors of both signs: learned scale a and per-feature threshold b.

    Forward:  codes = sign((x - b) / a), scale = a.
    Backward: g h((x - b) / a) to x, by default the window |x - b| <= a; minus that to b;
              sum(g sign(x - b)) / sqrt(k) to a.
    """
    scale = _required(scale, "elastic_signed")
    x = _shifted(x, shift)
    a = _per_token(scale, x, 1)
    inverse = jax.lax.stop_gradient(1 / a)
    slope = ste_lib.surrogate(ste, x * inverse, progress) * inverse
    return Quantized(straight_through(ste_lib.signs(x), (x,), (slope,)), a)


def elastic_unsigned(
    x: Float[Array, "... k"],
    *,
    ste: str = "clipped",
    scale: Float[Array, ""] | None = None,
    shift: Float[Array, "k"] | None = None,
    progress: Progress = 1.0,
    key: PRNGKeyArray | None = None,
) -> Quantized:
    """BiT's elastic {0, a} (2205.13016), for non-negative tensors: ReLU outputs, attention probabilities.

    Forward:  codes = round(clip(z, 0, 1)), z = (x - b) / a, scale = a; exactly half rounds to 0.
    Backward: g h to x, by default the window 0 <= z <= 1; minus that to b;
              to a, over sqrt(k), the sum of g (round(z) - z) inside, g above, 0 below.
    """
    scale = _required(scale, "elastic_unsigned")
    x = _shifted(x, shift)
    a = _per_token(scale, x, 1)
    return Quantized(round_scaled(x, a, lambda z: jnp.round(jnp.clip(z, 0, 1)), 0, 1, ste), a)


def _required(scale: Array | None, name: str) -> Array:
    if scale is None:
        raise ValueError(f"{name}: got no scale, expected a learned one; set activation_scale='learned'")
    return scale


def top_k(
    x: Float[Array, "... k"], fraction: float, by: Float[Array, "... k"] | None = None, ste: str = "identity"
) -> Float[Array, "... k"]:
    """Zeroes all but the largest entries of each token (Q-Sparse 2407.10969, a4.8's attention output).

    Forward:  x 1[|by| >= its m-th largest], m = max(1, round(fraction k)), by = x by default; ties all stay.
    Backward: g, also for the entries that were zeroed; with ste="masked" (Q-Sparse's ablation) not for them.
    """
    if ste not in TOP_K_STES:
        raise ValueError(f"STE of top_k: got {ste!r}, expected one of {', '.join(TOP_K_STES)}")
    k = x.shape[-1]
    keep = max(1, round(fraction * k))
    if not 0 < fraction <= 1:
        raise ValueError(f"top_k fraction: got {fraction}, expected 0 < fraction <= 1")
    size = jnp.abs(jax.lax.stop_gradient(x if by is None else by))
    threshold = _nth_largest(size, keep)
    slope = jnp.ones_like(x) if ste == "identity" else (size >= threshold).astype(x.dtype)
    return straight_through(jnp.where(size < threshold, 0, x), (x,), (slope,))


def _nth_largest(x: Float[Array, "... k"], n: int) -> Float[Array, "... 1"]:
    """The n-th largest of each row of non-negative numbers, NaN above all: exact, bit by bit from the top.

    Non-negative floats order as their bits do. On a CPU ten times as fast as XLA's sort.
    """
    bits = jax.lax.bitcast_convert_type(_float32(x), jnp.int32)

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
    y = _float32(x).reshape(*x.shape[:-1], k // size, size)
    for _ in range(size.bit_length() - 1):
        # Each stage transforms the lowest bit of the index and moves it to the top; at the end all are back.
        pairs = y.reshape(*y.shape[:-1], size // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        y = jnp.concatenate([a + b, a - b], axis=-1)
    return y.reshape(x.shape) * (1 / size**0.5)
