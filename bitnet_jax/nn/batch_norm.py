"""Batch norm with running statistics in the collection `batch_stats`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization.scales import floats
from bitnet_kernels.reference import rounded_product


class BatchNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` per feature (1502.03167), in float32.

    In training (deterministic=False) mean and variance are those of the batch, over all axes but the last, and the
    running statistics are updated by `m <- momentum m + (1 - momentum) batch` if `batch_stats` is mutable. Otherwise
    the running statistics are used: a fixed affine map per feature, bit-identical in latent and packed models because
    the product is rounded before the bias is added.
    """

    momentum: float = 0.9
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"], deterministic: bool) -> Float[Array, "*rows D"]:
        x = floats("x", x)
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if deterministic:
            centre, spread = mean.value, var.value
        else:
            centre = jnp.mean(rows, axis=0)
            spread = jnp.mean(jnp.square(rows - centre[None]), axis=0)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                mean.value = self.momentum * mean.value + (1 - self.momentum) * centre
                var.value = self.momentum * var.value + (1 - self.momentum) * spread
        factor = scale * jax.lax.rsqrt(spread + self.eps)
        y = rounded_product(rows - centre[None], factor[None]) + bias[None]
        return y.reshape(x.shape).astype(x.dtype)
