"""Rotary position embedding (RoFormer, 2104.09864), in the half-rotation layout of GPT-NeoX and Llama."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax.nn.rope_scaling import RopeScaling
from bitnet_jax.quantization.scales import floats
from bitnet_kernels.kv_cache import rotate as turn


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angle per position of each of the h/2 channel pairs: `theta^(-2i/h)`, changed by `scaling`, float32.

    A NumPy constant, so that all devices use the same values.

    Raises:
      ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary positions pair channels, use an even head_dim")
    values = float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
    return (values if scaling is None else scaling.scaled(values, theta)).astype(np.float32)


def angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[Array, "B T h"]:
    """The cosines of `position * theta^(-2i/h)` for the h/2 channel pairs of a head, then the sines, in float32; or of
    scaled frequencies, and `scaling` may also lengthen them (RopeScaling.magnitude)."""
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions are {positions.dtype}; expected integers")
    turns = positions[..., None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)[None, None, :]
    both = jnp.concatenate([jnp.cos(turns), jnp.sin(turns)], axis=-1)
    if scaling is not None and scaling.magnitude != 1:
        both = both * scaling.magnitude
    # Multiply by the identity, which is exact: otherwise XLA's CPU backend fuses the cosine into its users and
    # recomputes it for every head of every layer.
    return jnp.einsum("btc,cd->btd", both, jnp.eye(both.shape[-1], dtype=jnp.float32), precision="highest")


def rotate(
    x: Float[Array, "B T H h"],
    positions: Int[Array, "B T"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T H h"]:
    """Rotates each channel pair (i, i + h/2) of each head by its angle, see `angles`.

    As complex numbers: `(x_i + 1j x_{i+h/2}) * exp(1j position theta^(-2i/h))`, so q.k depends only on the difference
    of positions. Cosines and sines are computed in float32 and then cast to the dtype of x: bfloat16 angles would be
    off by whole turns at positions in the thousands.
    """
    x = floats("x", x)
    return turn(x, angles(positions, x.shape[-1], theta, scaling))
