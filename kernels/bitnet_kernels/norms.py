"""rms_norm: RMSNorm over the last axis.

    y = x / sqrt(mean(x^2) + eps) * gain                                     1910.07467

`reference_rms_norm` is the definition, by XLA. The C++ kernel (csrc/ffi_norm.cc) differs from it by rounding: XLA's
order of summation is its own, the kernel's is fixed, so that its result for a row does not depend on the other rows,
the number of threads or the instruction set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu
from bitnet_kernels.dtypes import floats

IMPLEMENTATIONS = ("cpu", "reference")


def reference_rms_norm(x: jax.Array, gain: jax.Array | None = None, *, eps: float) -> jax.Array:
    """The definition of `rms_norm`.

    Raises:
      ValueError: inconsistent shapes or dtypes.
    """
    x, gain = _checked(x, gain)
    return _with_gain(_normalized(x.astype(jnp.float32), eps).astype(x.dtype), gain)


def rms_norm(
    x: jax.Array, gain: jax.Array | None = None, *, eps: float, implementation: str | None = None
) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, in float32, cast to the dtype of x, then times the gain.

    Args:
      x: float [..., k].
      gain: float [k], cast to the dtype of x; None: no gain.
      implementation: None selects the C++ kernel when compiling for CPU, else XLA, with a warning if the library is
        missing. "cpu" or "reference" forces one. Both are within (k / 16 + 8) * 2^-24 of the exact result, relative,
        XLA's within (k + 4) * 2^-24 in the worst case.

    Under differentiation both result and gradient are those of the reference. Works under jit, vmap, scan and
    while_loop.

    Raises:
      ValueError: inconsistent shapes or dtypes, an unknown implementation.
      NotImplementedError: implementation="cpu" without the C++ library.
    """
    x, gain = _checked(x, gain)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}; expected None or one of {IMPLEMENTATIONS}")
    name, isa = cpu.resolve("rms_norm", implementation, cpu.unavailable())
    if isa is None or not x.size:
        return reference_rms_norm(x, gain, eps=eps)
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    # The kernel applies the gain in float32; in narrower types it follows the rounding of the norm.
    factors = jnp.zeros((0, x.shape[-1]), jnp.float32)
    if gain is not None and x.dtype == jnp.float32:
        factors, gain = gain.astype(jnp.float32)[None], None
    y = _norm(float(eps), name)(rows, factors).reshape(x.shape).astype(x.dtype)
    return _with_gain(y, gain)


def _checked(x: jax.Array, gain: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    x = floats("x", x)
    if x.ndim < 1:
        raise ValueError("x has shape (); expected (..., k)")
    if gain is None:
        return x, None
    gain = floats("gain", gain)
    if gain.shape != x.shape[-1:]:
        raise ValueError(f"gain has shape {gain.shape}; expected {x.shape[-1:]} for x of shape {x.shape}")
    return x, gain


def _normalized(x: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _with_gain(y: jax.Array, gain: jax.Array | None) -> jax.Array:
    return y if gain is None else y * jnp.expand_dims(gain.astype(y.dtype), range(y.ndim - 1))


@functools.cache
def _norm(eps: float, implementation: str | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The operation on rows [m, k] and factors [1, k], or [0, k] for none, all float32."""

    def by_xla(rows: jax.Array, factors: jax.Array) -> jax.Array:
        y = _normalized(rows, eps)
        return y * factors if len(factors) else y

    by_cpu = functools.partial(cpu.rms_norm, eps=eps)
    branches = {"cpu": by_cpu} if implementation == "cpu" else {"cpu": by_cpu, "default": by_xla}

    @jax.custom_jvp
    def norm(rows: jax.Array, factors: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(rows, factors, **branches)

    @norm.defjvp
    def of_the_reference(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(by_xla, primals, tangents)

    return norm
