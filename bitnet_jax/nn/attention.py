"""Grouped-query attention between four quantized projections, with a choice of what the scores become.

    q, k, v = heads(q_proj x), heads(k_proj x), heads(v_proj x);   q, k = rotate(q), rotate(k)
    o_i = sum_j P_ij v_j                                           y = o_proj(sub_norm(concat heads o))

    softmax     P = softmax(q.k s)                                    over the visible keys
    relu        P = relu(q.k s) / number of visible keys              2309.08586: exact zeros, no exponential
    binary_qk   softmax of ±1 q and k, each times its mean magnitude  BinaryAttention, 2603.09582
    binary      q and k plain ±1, and P rounded to {0, a}, a learned  BiT, 2205.13016
    linear      no scores at all: see linear_attention.py

`s` is the score scale, 1/sqrt(h) by default; "linear" has none. A query that sees no key (left padding) gets
P = 0 and passes no gradient. Query head j reads kv head j // (H / K). Softmax over a cache is
`bitnet_kernels.cached_attention`, C++ on a CPU, for latent and for packed weights alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from bitnet_jax.nn import linear_attention
from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.linear import BitLinear, apply_together
from bitnet_jax.nn.linear_attention import LinearState, zero_state
from bitnet_jax.nn.norms import block_norm
from bitnet_jax.nn.rotary import rotate
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS
from bitnet_jax.quantization.scales import absmax, floats
from bitnet_jax.quantization.ste import straight_through
from bitnet_kernels import cached_attention

# Latent q and k outside [-1, 1] get no gradient, which bounds them (BNN, BiBERT).
QK_STE = "clipped"


class KVCache(NamedTuple):
    """Keys (already rotated) and values of all positions; those not written yet are kept out by `visible`.

    float32; bfloat16, as such or as its bits in uint16 (XLA's CPU converts all of a bfloat16 array to write a few
    positions of it); or int8 codes with one scale per token and head, see `quantize_kv`.
    """

    k: Array  # [B, S, K, h]
    v: Array  # [B, S, K, h]
    k_scale: Float[Array, "B S K"] | None = None
    v_scale: Float[Array, "B S K"] | None = None


def quantize_kv(
    x: Float[Array, "B T K h"], bits: int = 8
) -> tuple[Int8[Array, "B T K h"], Float[Array, "B T K"]]:
    """int8 codes up to q = 2^(bits-1) - 1 and the scale of each token and head: `scale = max|x| / q`,
    `codes = round(x / scale)`.

    codes * scale is within scale / 2 of x. Where all of x is 0 both are 0. Where x holds NaN or infinity, so does
    the scale, and every value of that token and head is NaN.
    """
    x, q = floats("x", x).astype(jnp.float32), 2 ** (bits - 1) - 1
    scale = absmax(x) / q
    codes = jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]), -q, q)
    return jnp.where(jnp.isfinite(scale)[..., None], codes, 0.0).astype(jnp.int8), scale


def fake_quantized_kv(x: Float[Array, "B T K h"], bits: int) -> Float[Array, "B T K h"]:
    """The values that `quantize_kv` stands for. Backward: g."""
    codes, scale = quantize_kv(jax.lax.stop_gradient(x), bits)
    value = (codes.astype(jnp.float32) * scale[..., None]).astype(x.dtype)
    return straight_through(value, (x,), (jnp.ones_like(x),))


def dot_scores(
    q: Float[Array, "B T H h"], k: Float[Array, "B S K h"], scale: float
) -> Float[Array, "B H T S"]:
    """`q_i . k_j * scale` per query head, in float32."""
    q, k = floats("q", q), floats("k", k)
    B, T, H, h = q.shape
    S, K = k.shape[1:3]
    grouped = q.reshape(B, T, K, H // K, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32)
    return scores.reshape(B, H, T, S) * scale


def mix_values(p: Float[Array, "B H T S"], v: Float[Array, "B S K h"]) -> Float[Array, "B T H h"]:
    """`sum_j P_ij v_j`: P is cast to the dtype of v, sums are float32, the result has the dtype of v."""
    p, v = floats("p", p), floats("v", v)
    B, H, T, S = p.shape
    K, h = v.shape[2:]
    grouped = p.astype(v.dtype).reshape(B, K, H // K, T, S)
    mixed = jnp.einsum("bkgts,bskh->btkgh", grouped, v, preferred_element_type=jnp.float32)
    return mixed.reshape(B, T, H, h).astype(v.dtype)


def masked_softmax(scores: Float[Array, "B H T S"], visible: Bool[Array, "B T S"]) -> Float[Array, "B H T S"]:
    """Softmax over the visible keys. Hidden scores are the lowest number, not -inf: a row of -inf is NaN."""
    scores, visible = floats("scores", scores), visible[:, None]
    hidden = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    return jnp.where(visible, jax.nn.softmax(hidden, axis=-1), 0.0)


def softmax(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    visible: Bool[Array, "B T S"],
    scale: float,
    progress: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B H T S"]:
    """`P_ij = exp(s q_i.k_j) / sum_j' exp(s q_i.k_j')`."""
    return masked_softmax(dot_scores(q, k, scale), visible)


def relu(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    visible: Bool[Array, "B T S"],
    scale: float,
    progress: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B H T S"]:
    """`P_ij = max(0, s q_i.k_j) / n_i`, n_i the number of keys that query i sees."""
    scores = jnp.where(visible[:, None], jax.nn.relu(dot_scores(q, k, scale)), 0.0)
    seen = jnp.sum(visible, axis=-1, dtype=jnp.int32).astype(jnp.float32)[:, None, :, None]
    return scores / jnp.maximum(seen, 1.0)


def binary_qk(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    visible: Bool[Array, "B T S"],
    scale: float,
    progress: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B H T S"]:
    """Softmax attention of `mean|q| sign(q)` and `mean|k| sign(k)`.

    The means run over the channels of one token and head. The paper's also run over the tokens, which in a
    causal model would let a token see the magnitude of later ones.
    """
    code = partial(ACTIVATION_QUANTIZERS["sign_absmean"], ste=QK_STE, progress=progress)
    return softmax(code(q).dequantize(), code(k).dequantize(), visible, scale)


def binary(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    visible: Bool[Array, "B T S"],
    scale: float,
    progress: Float[Array, ""] | float = 1.0,
    *,
    probability_scale: Float[Array, ""],
) -> Float[Array, "B H T S"]:
    """Softmax attention of `sign(q)` and `sign(k)`, then `P = a round(clip(P / a, 0, 1))`.

    The values stay real: with P in {0, a} they are selected and added, never multiplied.
    """
    code = partial(ACTIVATION_QUANTIZERS["sign"], ste=QK_STE, progress=progress)
    p = softmax(code(q).codes, code(k).codes, visible, scale)
    return ACTIVATION_QUANTIZERS["elastic_unsigned"](p, scale=probability_scale).dequantize()


# Kind of attention -> mixing weights P of (q, k, visible, scale, progress). "linear" never forms P.
MIXING_WEIGHTS: dict[str, Callable[..., Array]] = {
    "softmax": softmax,
    "relu": relu,
    "binary_qk": binary_qk,
    "binary": binary,
}


def write_at(
    old: Shaped[Array, "B S *rest"], new: Shaped[Array, "B T *rest"], length: Int[Array, "*rows"]
) -> Shaped[Array, "B S *rest"]:
    """`old` with `new` at [length, length + T) of axis 1; `length` is one place, or [B], a place for each row."""
    if not length.ndim:
        return jax.lax.dynamic_update_slice_in_dim(old, new, length, axis=1)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(old, new, length)


def write(cache: KVCache, k: Array, v: Array, length: Int[Array, "*rows"]) -> KVCache:
    """The cache with the keys and values [B, T, K, h] of new tokens at positions [length, length + T).

    Raises:
      ValueError: more tokens than the whole cache has room for. (`length` is traced: that they fit behind it is
        the caller's duty.)
    """
    k, v = floats("k", k), floats("v", v)
    T, S = k.shape[1], cache.k.shape[1]
    if T > S:
        raise ValueError(f"{T} tokens do not fit into a cache of {S} positions; make a longer cache")

    def at_length(old: Array, new: Array) -> Array:
        if old.dtype == jnp.uint16:
            new = jax.lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
        return write_at(old, new.astype(old.dtype), length)

    if cache.k_scale is None or cache.v_scale is None:
        return KVCache(at_length(cache.k, k), at_length(cache.v, v))
    (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
    return KVCache(
        at_length(cache.k, k),
        at_length(cache.v, v),
        at_length(cache.k_scale, k_scale),
        at_length(cache.v_scale, v_scale),
    )


def remembered(cache: KVCache) -> tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]:
    """The keys and values of a cache; codes become float32."""
    if cache.k.dtype == jnp.uint16:
        k, v = (jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in (cache.k, cache.v))
        return k, v
    if cache.k_scale is None or cache.v_scale is None:
        return cache.k, cache.v
    k, v = cache.k.astype(jnp.float32), cache.v.astype(jnp.float32)
    return k * cache.k_scale[..., None], v * cache.v_scale[..., None]


class Attention(nn.Module):
    """Owns the projections q_proj, k_proj, v_proj, o_proj, the sub norm (placement "sub") and, for kind
    "binary", `probability_scale` []. All else is the functions above.

    Args of a call:
      x: [B, T, D].
      positions: [B, T], for the rotary embedding.
      visible: [B, T, S], True where query i may read key j. S is T, or the room of the cache.
      key_mask: [B, T], False for padding among the new tokens. Causal "linear" attention looks at this and
        not at `visible`, for it only knows "everything before".
      cache, length: what was remembered, and how many positions of it are written: one number, or [B].

    Returns: y [B, T, D] and the cache after these tokens (None without a cache).
    """

    config: TransformerShape
    precisions: Mapping[str, Precision]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B T S"],
        key_mask: Bool[Array, "B T"] | None = None,
        cache: KVCache | LinearState | None = None,
        length: Int[Array, "*rows"] | None = None,
        progress: Float[Array, ""] | float = 1.0,
    ) -> tuple[Float[Array, "B T D"], KVCache | LinearState | None]:
        config, kind = self.config, self.config.attention
        B, T, D = x.shape

        counts = {"q_proj": config.num_heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
        linears = [
            BitLinear.of(config, count * config.head_size, self.precisions[name], name)
            for name, count in counts.items()
        ]
        q, k, v = (y.reshape(B, T, -1, config.head_size) for y in apply_together(linears, x, progress))
        self.sow("intermediates", "qkv", (q, k, v))  # kept only where a caller asks for it: distillation
        if config.position == "rope":
            q, k = rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta)
        if config.kv_bits is not None:
            k, v = fake_quantized_kv(k, config.kv_bits), fake_quantized_kv(v, config.kv_bits)

        if kind == "linear":
            if isinstance(cache, KVCache):
                raise TypeError(
                    "linear attention remembers a LinearState, got a KVCache of another kind's model"
                )
            k, v = (jnp.repeat(x, config.num_heads // config.kv_heads, axis=2) for x in (k, v))
            if config.causal:
                past = cache or zero_state(B, config.num_heads, config.head_size)
                o, state = linear_attention.chunked(q, k, v, past, key_mask)
                cache = state if cache else None
            else:
                o = linear_attention.parallel(q, k, v, visible)
        else:
            if isinstance(cache, LinearState):
                raise TypeError(
                    f"{kind} attention remembers a KVCache, got the LinearState of linear attention"
                )

            def mixed(k: Array, v: Array) -> Array:
                weigh = MIXING_WEIGHTS[kind]
                if kind == "binary":
                    # BiT starts at 4 times the mean of P, and a row of P over S keys has the mean 1/S.
                    init = nn.initializers.constant(4.0 / config.max_length)
                    weigh = partial(
                        weigh, probability_scale=self.param("probability_scale", init, (), jnp.float32)
                    )
                return mix_values(weigh(q, k, visible, config.score_scale, progress), v.astype(q.dtype))

            if cache is None:
                o = mixed(k, v)
            elif length is None:
                raise ValueError("got a cache without its length; pass how many of its positions are written")
            else:
                cache = write(cache, k, v, length)
                if kind == "softmax":
                    o = cached_attention(
                        q,
                        cache.k,
                        cache.v,
                        visible,
                        config.score_scale,
                        length=jnp.max(length) + T,
                        k_scale=cache.k_scale,
                        v_scale=cache.v_scale,
                    )
                    o = o.astype(q.dtype)
                else:
                    o = mixed(*remembered(cache))

        o = o.reshape(B, T, config.num_heads * config.head_size)
        if config.norm_placement == "sub":
            o = block_norm(config, "sub_norm")(o)
        return BitLinear.of(config, D, self.precisions["o_proj"], "o_proj")(o, progress), cache
