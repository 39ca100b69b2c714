"""Warm-up: a layer passes from one form to another, as from float to quantized, in the first part of training.

    blend(a, b, amount) = (1 - amount) a + amount b        amount = min(1, progress / share)

It is exactly a at amount 0 and exactly b at amount 1, if both are finite, which a + amount (b - a) is not. Progress is
the fraction of training done. Outside of training it is 1, so that evaluations and packed models are always of the
final form. The form of the blend is that of Hestia (2601.20745), with p for the amount.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization.ste import Progress


def warm_up(progress: Progress, share: float) -> Progress:
    """The amount after `progress`; 1.0, a Python number, if the share is 0 or if progress is one beyond it."""
    if share == 0 or (isinstance(progress, float | int) and progress >= share):
        return 1.0
    return jnp.minimum(jnp.asarray(progress, jnp.float32) / share, 1.0)


def blend(a: Float[Array, "..."], b: Float[Array, "..."], amount: Progress) -> Float[Array, "..."]:
    """(1 - amount) a + amount b in float32."""
    amount = jnp.asarray(amount, jnp.float32)
    return (1 - amount) * a.astype(jnp.float32) + amount * b.astype(jnp.float32)


def check_share(setting: str, share: float) -> None:
    """Raises ValueError: not a share of training that ends before training does."""
    if not 0 <= share < 1:
        raise ValueError(f"{setting}: got {share}, expected a share of training from 0 to below 1")
