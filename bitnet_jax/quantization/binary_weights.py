"""Two-level weight quantizers (codes by comparison): f(w [n, k], args, *, options) -> codes [n, k], scale [#n, G].

Conventions shared by all quantizers are in registry.py. "Backward" is d(codes * scale)/dw times the incoming
gradient g; h is the slope of the STE named by `args`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization import ste as ste_lib
from bitnet_jax.quantization.arguments import DEFAULT, Arguments
from bitnet_jax.quantization.scales import (
    SMALLEST_SCALE,
    Quantized,
    as_float32,
    learned,
    measure,
    shared_count,
    spread,
)
from bitnet_jax.quantization.ste import straight_through


def _binary(
    w: Array,
    centre: Array | float,
    args: Arguments,
    *,
    zero: int = 1,
    window: str = "scaled",
    scale_gradient: bool = False,
    count: str = "shared",
) -> Quantized:
    """sign(w - centre) with scale mean|w|, shared by the binary quantizers."""
    v = w - centre
    if args.scale is None:
        scale = jnp.maximum(measure(jnp.mean, jnp.abs(w), args.granularity), SMALLEST_SCALE)
        scale = scale if scale_gradient else jax.lax.stop_gradient(scale)
    else:
        scale = learned(as_float32(args.scale), shared_count(w, args.scale, count), 1)
    inverse = jax.lax.stop_gradient(spread(1 / scale, w.shape[-1]))
    if window == "scaled":
        slope = ste_lib.surrogate(args.ste, v * inverse, args.progress) * inverse
    elif window == "raw":
        slope = ste_lib.surrogate(args.ste, v, args.progress)
    else:
        raise ValueError(f"window: got {window!r}, expected 'scaled' or 'raw'")
    return Quantized(straight_through(ste_lib.signs(w, zero, centre), (v,), (slope,)), scale)


def binary(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    zero: int = 1,
    window: str = "scaled",
    scale_gradient: bool = False,
    count: str = "shared",
) -> Quantized:
    """Plain sign with the optimal scale mean|W|, or a learned one.

    Forward:  codes = sign(W), sign(0) = `zero`; scale = max(mean|W|, 1e-5) or the learned s.
    Backward: window="scaled": g h(W / scale); window="raw": g scale h(W), larq's magnitude-aware sign.
              A learned s gets sum(g sign(W)) / sqrt(N); with ste="clipped", h is BiT's window |W| <= s
              (2205.13016). scale_gradient=True also differentiates mean|W| itself.
    Source:   XNOR-Net (1603.05279); BiT (2205.13016) and ParetoQ (2502.02631) for the learned scale.
    """
    return _binary(
        as_float32(w), 0.0, args, zero=zero, window=window, scale_gradient=scale_gradient, count=count
    )


def binary_centred(
    w: Float[Array, "n k"],
    args: Arguments = DEFAULT,
    *,
    zero: int = -1,
    centre_gradient: bool = False,
    scale_gradient: bool = False,
    count: str = "shared",
) -> Quantized:
    """BitNet's sign of centred weights, scaled by the mean magnitude of the uncentred ones.

    Forward:  codes = sign(W - mean W), sign(0) = `zero` (-1 in the paper); scale = max(mean|W|, 1e-5).
              The mean is over the weights that share a scale (the paper's group quantization).
    Backward: g h((W - mean W) / scale); centre_gradient=True (IR-Net, BiBERT) also subtracts the mean of that.
    Source:   BitNet (2310.11453).
    """
    w = as_float32(w)
    mean = spread(measure(jnp.mean, w, args.granularity), w.shape[-1])
    centre = mean if centre_gradient else jax.lax.stop_gradient(mean)
    return _binary(w, centre, args, zero=zero, scale_gradient=scale_gradient, count=count)


def binary_raw(w: Float[Array, "n k"], args: Arguments = DEFAULT) -> Quantized:
    """Unscaled signs; with a learned scale, `binary` with window="raw".

    Forward:  codes = +1 where W >= 0 else -1; scale = 1.
    Backward: g h(W). The papers use the identity and clip the latents to [-1, 1] after the update.
    Source:   BinaryConnect (1511.00363) and BNN (1602.02830).
    """
    w = as_float32(w)
    if args.scale is not None:
        return _binary(w, 0.0, args, window="raw")
    return Quantized(ste_lib.sign(w, args.ste, args.progress), jnp.ones((*w.shape[:-2], 1, 1), jnp.float32))


def binary_stochastic(w: Float[Array, "n k"], args: Arguments = DEFAULT) -> Quantized:
    """Random signs whose mean is the latent weight.

    Forward:  codes = +1 with probability clip((W + 1) / 2, 0, 1), else -1; scale = 1 or the learned one. Without
              a key (evaluation, packing), the deterministic `binary_raw`.
    Backward: g h(W).
    Source:   stochastic BinaryConnect (1511.00363).
    """
    raw = binary_raw(w, args)
    if args.key is None:
        return raw
    return raw._replace(codes=ste_lib.stochastic_sign(as_float32(w), args.key, args.ste, args.progress))


def bwn(w: Float[Array, "n k"], args: Arguments = DEFAULT) -> Quantized:
    """Binary-Weight-Network; with a learned scale, `binary` with window="raw".

    Forward:  codes = sign(W), scale = max(mean|W|, 1e-5) over the n weights that share it.
    Backward: g (1/n + scale h(W)): the window is on the raw latents, and 1/n is the paper's term for the
              dependence of the scale on W (elementwise, as in the released code).
    Source:   XNOR-Net (1603.05279).
    """
    w = as_float32(w)
    if args.scale is not None:
        return _binary(w, 0.0, args, window="raw")
    size = measure(jnp.mean, jnp.abs(w), args.granularity)
    scale = jax.lax.stop_gradient(jnp.maximum(size, SMALLEST_SCALE))
    share = spread(1 / (shared_count(w, scale, "shared") * scale), w.shape[-1])
    slope = ste_lib.surrogate(args.ste, w, args.progress) + share
    return Quantized(straight_through(ste_lib.signs(w), (w,), (slope,)), scale)


def zero_one(w: Float[Array, "n k"], args: Arguments = DEFAULT, *, count: str = "shared") -> Quantized:
    """Weights in {0, 1}, with which training reportedly fails early.

    Forward:  codes = 1[W > 0]; scale = max(mean|W|, 1e-5) or the learned s.
    Backward: g h(W / scale), and to a learned s as in `binary`: the slopes of a sign, not halved.
    Source:   BitNet's "Training Tips, Code and FAQ".
    """
    signs = _binary(as_float32(w), 0.0, args, zero=-1, count=count)
    codes = straight_through((signs.codes + 1) * 0.5, (signs.codes,), (jnp.ones_like(signs.codes),))
    return Quantized(codes, signs.scale)
