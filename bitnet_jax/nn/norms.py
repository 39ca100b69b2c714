"""RMSNorm and LayerNorm over the last axis."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.placement import on_one_device
from bitnet_jax.quantization.scales import floats
from bitnet_jax.quantization.ste import Progress
from bitnet_jax.quantization.warmup import blend, warm_up
from bitnet_kernels import rms_norm


def root_mean_square_norm(
    x: Float[Array, "*rows D"], gain: Float[Array, "D"] | None = None, *, eps: float
) -> Float[Array, "*rows D"]:
    """`bitnet_kernels.rms_norm`, by XLA on several devices: for the kernel it would gather x on each of them."""
    return rms_norm(x, gain, eps=eps, implementation=None if on_one_device() else "reference")


def layer_norm(
    x: Float[Array, "*rows D"],
    gain: Float[Array, "D"] | None = None,
    *,
    eps: float,
    bias: Float[Array, "D"] | None = None,
) -> Float[Array, "*rows D"]:
    """`(x - mean) / sqrt(var + eps)`, computed in float32, cast to the dtype of x, then times the gain (1607.06450),
    plus the bias."""
    x = floats("x", x)
    x32 = x.astype(jnp.float32)
    y = root_mean_square_norm(x32 - jnp.mean(x32, axis=-1, keepdims=True), eps=eps).astype(x.dtype)
    if gain is not None:
        y = y * jnp.expand_dims(gain.astype(x.dtype), range(x.ndim - 1))
    return y if bias is None else y + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


NORMS = {"rmsnorm": root_mean_square_norm, "layernorm": layer_norm}


class Norm(nn.Module):
    """One of NORMS with an optional gain. A bias is for published encoders: the 1-bit papers use none.

    The gain is applied after the cast back to the input dtype, as in the released 2B-4T model. Where nothing is
    differentiated, RMSNorm on one device runs `bitnet_kernels.rms_norm` (C++ on CPU), with latent and packed weights
    alike.
    """

    kind: str = "rmsnorm"
    eps: float = 1e-5
    use_scale: bool = True
    use_bias: bool = False  # of LayerNorm

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale = None
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        if not self.use_bias:
            return NORMS[self.kind](x, scale, eps=self.eps)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, scale, eps=self.eps, bias=bias)


def block_norm(config: TransformerShape, name: str) -> Norm:
    """The norm before or after a block, before the output head, or before an output projection (SubLN)."""
    return Norm(config.norm, config.norm_eps, config.norm_scale, config.norm_bias, name=name)


def sub_norm(
    config: TransformerShape, x: Float[Array, "*rows D"], progress: Progress = 1.0
) -> Float[Array, "*rows D"]:
    """The input of an output projection: for placement "sub" the norm of x, else x.

    With `sub_norm_warmup` training begins with x itself, `blend(x, norm(x), warm_up(progress, sub_norm_warmup))`: no
    gain makes an RMSNorm the identity, so a float model that gets sub norms would be another function.
    """
    if config.norm_placement != "sub":
        return x
    normed = block_norm(config, "sub_norm")(x)
    amount = warm_up(progress, config.sub_norm_warmup)
    return normed if isinstance(amount, float) else blend(x, normed, amount).astype(x.dtype)


def projection_norm(config: TransformerShape) -> Norm | None:
    """The norm that a linear layer applies to its own input, if any.

    Placement "inside" is the original BitNet (2310.11453: no gain); `inside_norm` is the Hugging Face option
    `use_rms_norm`, with a gain. parent=None lets the linear layer adopt it, so its gain is at `<linear>/norm/scale`.
    """
    if config.norm_placement == "inside":
        return Norm(config.norm, config.norm_eps, use_scale=False, parent=None)
    return Norm("rmsnorm", config.inside_norm_eps, parent=None) if config.inside_norm else None
