"""Straight-through estimators: surrogate gradients for step functions.

A quantizer's forward pass is a staircase, whose derivative is zero almost everywhere. A straight-through estimator
(STE) replaces it by a surrogate h(z). The two are independent here: step functions (`sign`, `heaviside`,
`round_to_grid`, `stochastic_sign`) define the forward value, `STES` holds the surrogates by name, for example

    y = sign(z, ste="approx_sign")      forward  y = +1 or -1        backward  dL/dz = dL/dy * h(z)

Every surrogate is a function `h(z, progress)` of the normalized input and of the fraction of training done (a float
in [0, 1], possibly traced); only the annealed ones use `progress`. Its result broadcasts to z.

NaN propagates: each step returns NaN where its input is NaN, never a finite code. The surrogate slope there is finite
(1 for identity, 0 for windows), so NaN spreads through forward values, which the training loop checks. Infinite
inputs get the outermost code, and slope 0 in every windowed surrogate.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bitnet_jax.names import check_name

Progress = float | Float[Array, ""]


@jax.custom_jvp
def straight_through(value: Array, inputs: tuple[Array, ...], slopes: tuple[Array, ...]) -> Array:
    """Returns `value`, differentiated as if it were `sum(slope * input)`.

    Forward:  value, unchanged (unlike `x + stop_gradient(q - x)`, which rounds and turns inf into NaN).
    Backward: dL/dinput_i = dL/dvalue * slope_i, summed over axes that input_i broadcasts; value and slopes get no
              gradient.

    Supports forward and reverse mode. All arrays have the same dtype; inputs and slopes broadcast to value.
    """
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    value, _, slopes = primals
    _, input_tangents, _ = tangents
    tangent = sum(dot * slope for dot, slope in zip(input_tangents, slopes, strict=True))
    return value, jnp.broadcast_to(tangent, value.shape)


def _one(z: Array) -> Array:
    """A slope of 1 as a single broadcastable element, because the backward pass stores slopes."""
    return jnp.ones((1,) * z.ndim, z.dtype)


def identity(z: Float[Array, "..."], progress: Progress = 1.0) -> Float[Array, "..."]:
    """h(z) = 1: BinaryConnect (1511.00363), BitNet (2310.11453). Latents need weight decay or clipping."""
    return _one(z)


def clipped(z: Float[Array, "..."], progress: Progress = 1.0) -> Float[Array, "..."]:
    """h(z) = 1[|z| <= 1]: the hard-tanh window of BNN (1602.02830)."""
    return (jnp.abs(z) <= 1).astype(z.dtype)


def approx_sign(z: Float[Array, "..."], progress: Progress = 1.0) -> Float[Array, "..."]:
    """h(z) = (2 - 2|z|) 1[|z| <= 1]: the triangle of Bi-Real Net (1808.00278); integral 2, sign's jump."""
    size = jnp.abs(z)
    return jnp.where(size <= 1, 2 - 2 * size, 0)


def swish_sign(z: Float[Array, "..."], progress: Progress = 1.0, beta: float = 5.0) -> Float[Array, "..."]:
    """h(z) = b (2 - b z tanh(b z / 2)) / (1 + cosh(b z)) with b = 5: BNN+.

    h(0) = b, negative for |z| > 0.48, integral 2. For |b z| > 40 the value is below 1e-14 and set to 0, which keeps
    cosh finite.
    """
    u = beta * z
    inside = jnp.abs(u) < 40
    u = jnp.where(inside, u, 0)
    return jnp.where(inside, beta * (2 - u * jnp.tanh(u / 2)) / (1 + jnp.cosh(u)), 0)


def tanh(
    z: Float[Array, "..."], progress: Progress = 1.0, t_min: float = 1e-3, t_max: float = 10.0
) -> Float[Array, "..."]:
    """h(z) = k t (1 - tanh^2(t z)), t = t_min (t_max / t_min)^progress, k = max(1/t, 1).

    The EDE of IR-Net (1909.10788): nearly the identity on [-1, 1] at progress 0, a narrow peak of height
    t_max at progress 1. The limits are those of the released ResNet-20 script.
    """
    t = t_min * jnp.asarray(t_max / t_min, z.dtype) ** jnp.asarray(progress, z.dtype)
    return jnp.maximum(1 / t, 1) * t * (1 - jnp.tanh(t * z) ** 2)


def reste(
    z: Float[Array, "..."],
    progress: Progress = 1.0,
    order_end: float = 3.0,
    near: float = 0.1,
    far: float = 1.5,
) -> Float[Array, "..."]:
    """Derivative of sign(z)|z|^(1/o), bounded near 0 and zero beyond `far`: ReSTE (ICCV 2023).

    h(z) = (1/o) |z|^(1/o - 1) for near < |z| <= far, near^(1/o) / near for |z| <= near, 0 beyond.
    The order grows as o = 1 + (1 - cos(pi/2 progress)) (order_end - 1); o = 1 is the window 1[|z| <= far].
    """
    size = jnp.abs(z)
    order = 1 + (1 - jnp.cos(jnp.pi / 2 * jnp.asarray(progress, z.dtype))) * (order_end - 1)
    power = (1 / order) * jnp.clip(size, near, far) ** (1 / order - 1)
    slope = jnp.where(size <= near, near ** (1 / order) / near, power)
    return jnp.where(size <= far, slope, 0)


STES: dict[str, Callable[..., Array]] = {
    "identity": identity,
    "clipped": clipped,
    "approx_sign": approx_sign,
    "swish_sign": swish_sign,
    "tanh": tanh,
    "reste": reste,
}
ANNEALED = frozenset({"tanh", "reste"})  # depend on `progress`


def surrogate(name: str, z: Array, progress: Progress = 1.0) -> Array:
    """h(z, progress) of the STE `name`, with stopped gradient. ValueError for an unknown name."""
    check_name("STE", name, STES)
    return jax.lax.stop_gradient(STES[name](jax.lax.stop_gradient(z), progress))


def signs(
    z: Float[Array, "..."], zero: int = 1, threshold: float | Float[Array, "..."] = 0.0
) -> Float[Array, "..."]:
    """sign(z - threshold): `zero` (+1 or -1) where they are equal (0 equals -0), NaN where NaN. No gradient.

    Compares instead of subtracting: subtracting a mean with a fused multiply-add would round differently.
    """
    z, threshold = jax.lax.stop_gradient(z), jax.lax.stop_gradient(threshold)
    positive = z >= threshold if zero > 0 else z > threshold
    return jnp.where(jnp.isnan(z - threshold), jnp.nan, jnp.where(positive, 1.0, -1.0)).astype(z.dtype)


def sign(
    z: Float[Array, "..."], ste: str = "identity", progress: Progress = 1.0, zero: int = 1
) -> Float[Array, "..."]:
    """Forward: +1 where z >= 0, else -1 (zero=-1: +1 only where z > 0, as BitNet). Backward: g * h(z)."""
    return straight_through(signs(z, zero), (z,), (surrogate(ste, z, progress),))


def heaviside(z: Float[Array, "..."], ste: str = "clipped", progress: Progress = 1.0) -> Float[Array, "..."]:
    """Forward: 1[z > 0], so 0 at 0 (larq's convention). Backward: g * h(z)."""
    stopped = jax.lax.stop_gradient(z)
    value = jnp.where(jnp.isnan(stopped), stopped, (stopped > 0).astype(z.dtype))
    return straight_through(value, (z,), (surrogate(ste, z, progress),))


def window(z: Array, low: float, high: float, ste: str) -> Array:
    """Slope of a rounding step between the codes low and high: 1 (identity) or 1[low <= z <= high] (clipped).

    The window includes its end points, with a tolerance of 1e-6: the weight that determines an absmax scale must not
    fall outside by rounding. Other surrogates model the single jump of a sign and raise ValueError here.
    """
    z = jax.lax.stop_gradient(z)
    if ste == "identity":
        return _one(z)
    if ste == "clipped":
        slack = 1e-6 * max(abs(low), abs(high))
        return ((z >= low - slack) & (z <= high + slack)).astype(z.dtype)
    raise ValueError(f"STE of a rounding step: got {ste!r}, expected 'identity' or 'clipped'")


def round_to_grid(
    z: Float[Array, "..."], low: float, high: float, ste: str = "identity"
) -> Float[Array, "..."]:
    """Forward: clip(round(z), low, high), half to even. Backward: g, or g 1[low <= z <= high] (clipped)."""
    value = jnp.clip(jnp.round(jax.lax.stop_gradient(z)), low, high)
    return straight_through(value, (z,), (window(z, low, high, ste),))


def stochastic_sign(
    z: Float[Array, "..."], key: PRNGKeyArray, ste: str = "identity", progress: Progress = 1.0
) -> Float[Array, "..."]:
    """Stochastic BinaryConnect (1511.00363); the paper's estimator is the identity.

    Forward:  +1 with probability clip((z + 1) / 2, 0, 1), else -1, so the mean is clip(z, -1, 1).
    Backward: g * h(z).
    """
    stopped = jax.lax.stop_gradient(z)
    uniform = jax.random.uniform(key, z.shape, z.dtype)
    value = jnp.where(uniform < jnp.clip((stopped + 1) / 2, 0, 1), 1, -1).astype(z.dtype)
    value = jnp.where(jnp.isnan(stopped), stopped, value)
    return straight_through(value, (z,), (surrogate(ste, z, progress),))
