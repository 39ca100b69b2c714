"""Products that are rounded before anything is added to them, in compiled code too."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rounded(values: jax.Array, scale: jax.Array) -> jax.Array:
    """values * scale, rounded before anything is added to it."""
    return unfused(values * scale)


def unfused(product: jax.Array) -> jax.Array:
    """A product that XLA does not fuse with a sum that follows.

    The minimum changes no value, but without an operation in between XLA fuses product and sum into one rounding, and
    compiled code would differ from uncompiled code and from C++ (jax 0.10 removes an optimization_barrier too early).
    """
    return jnp.where(jnp.isfinite(product), jnp.minimum(product, jnp.finfo(jnp.float32).max), product)
