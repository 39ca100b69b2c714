"""Weighted cross entropy as sums, so that micro-batches can be accumulated before dividing by the weight."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
    """Weighted sums over targets. Unlike means, sums over micro-batches add up to those of the full batch."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]  # total weight of the targets that have the largest logit
    weight: Float[Array, ""]


def cross_entropy_sums(
    logits: Float[Array, "*batch V"],
    targets: Int[Array | np.ndarray, "*batch"],
    weights: Float[Array | np.ndarray, "*batch"] | None = None,
    z_loss: float = 0.0,
) -> LossSums:
    """`sum w * (log Z - logits[target] + z_loss * (log Z)^2)` with `log Z = logsumexp(logits)`, in float32.

    Args:
      logits: unnormalized log probabilities of tokens or classes.
      targets: ids in [0, V).
      weights: 0 ignores a target (padding); default all 1.
      z_loss: pulls log Z to 0 (PaLM, 2204.02311, uses 1e-4).
    """
    logits = logits.astype(jnp.float32)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    terms = log_z - target_logits
    if z_loss:
        terms = terms + z_loss * jnp.square(log_z)
    correct = (jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets).astype(jnp.float32)
    return LossSums(jnp.sum(weights * terms), jnp.sum(weights * correct), jnp.sum(weights))
