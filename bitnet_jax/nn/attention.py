"""Grouped-query attention with four quantized projections and a choice of mixing weights.

    q, k, v = heads(q_proj x), heads(k_proj x), heads(v_proj x);   q, k = rotate(q), rotate(k)
    o_i = sum_j P_ij v_j                                           y = o_proj(sub_norm(concat heads o))

    softmax     P = softmax(q.k s)                                    over the visible keys
    relu        P = relu(q.k s) / number of visible keys              2309.08586: exact zeros, no exponential
    binary_qk   softmax of ±1 q and k, each times its mean magnitude  BinaryAttention, 2603.09582
    binary      unscaled ±1 q and k; P rounded to {0, a}, a learned   BiT, 2205.13016
    linear      no scores; see linear_attention.py

`s` is the score scale, 1/sqrt(h) by default; "linear" has none. A query with no visible key (left padding) has
P = 0 and zero gradient. Query head j uses kv head j // (H / K). Softmax over a cache runs
`bitnet_kernels.extend_and_attend` (C++ on CPU), with latent and packed weights alike; over a whole sequence in float32
`bitnet_kernels.softmax_attention`, which holds no scores in memory, unless a mesh has several devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax.nn import linear_attention
from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.context import context_parts, cut, join, whole_sequence
from bitnet_jax.nn.kv_cache import KVCache, cached_keys_values, fake_quantized_kv, write
from bitnet_jax.nn.linear import BitLinear, apply_fused
from bitnet_jax.nn.linear_attention import LinearState, zero_state
from bitnet_jax.nn.norms import block_norm, sub_norm
from bitnet_jax.nn.placement import automatic_axes, on_one_device
from bitnet_jax.nn.rotary import angles, rotate
from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS
from bitnet_jax.quantization.scales import floats
from bitnet_kernels import extend_and_attend, softmax_attention

# Latent q and k outside [-1, 1] get no gradient, which bounds them (BNN, BiBERT).
QK_STE = "clipped"

# Most scores of one layer in the memory of a device: 512 MB in float32, of which the backward pass holds several.
MOST_SCORES = 2**27


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
    """`sum_j P_ij v_j`, accumulated in float32; P is cast to the dtype of v, which is also that of the result."""
    p, v = floats("p", p), floats("v", v)
    B, H, T, S = p.shape
    K, h = v.shape[2:]
    grouped = p.astype(v.dtype).reshape(B, K, H // K, T, S)
    mixed = jnp.einsum("bkgts,bskh->btkgh", grouped, v, preferred_element_type=jnp.float32)
    return mixed.reshape(B, T, H, h).astype(v.dtype)


def masked_softmax(scores: Float[Array, "B H T S"], visible: Bool[Array, "B T S"]) -> Float[Array, "B H T S"]:
    """Softmax over the visible keys. Masked scores are the finite minimum: a row of -inf would give NaN."""
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
    """`P_ij = max(0, s q_i.k_j) / n_i`, n_i the number of keys visible to query i."""
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

    The means are over the channels of one token and head. The paper also averages over tokens, which would leak
    the magnitude of later tokens in a causal model.
    """
    code, args = ACTIVATION_QUANTIZERS["sign_absmean"], Arguments(ste=QK_STE, progress=progress)
    return softmax(code(q, args).dequantize(), code(k, args).dequantize(), visible, scale)


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

    The values v stay real: with P in {0, a} they are only selected and added.
    """
    code, args = ACTIVATION_QUANTIZERS["sign"], Arguments(ste=QK_STE, progress=progress)
    p = softmax(code(q, args).codes, code(k, args).codes, visible, scale)
    elastic = Arguments(ste="clipped", scale=probability_scale)
    return ACTIVATION_QUANTIZERS["elastic_unsigned"](p, elastic).dequantize()


# Kind of attention -> function (q, k, visible, scale, progress) -> P. "linear" never forms P.
MIXING_WEIGHTS: dict[str, Callable[..., Array]] = {
    "softmax": softmax,
    "relu": relu,
    "binary_qk": binary_qk,
    "binary": binary,
}


def in_pieces(
    mixed: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T H h"]:
    """`mixed(q, k, v, visible)`, the queries in the fewest equal pieces whose scores are at most MOST_SCORES a device.

    The scores of a piece are computed, reduced and, in the backward pass, computed again.
    """
    B, T, H, _ = q.shape
    scores = B * H * T * k.shape[1] // math.prod(automatic_axes().values())
    own = T // context_parts(T)  # queries of a device
    pieces = next((n for n in range(1, own) if own % n == 0 and scores // n <= MOST_SCORES), own)
    if pieces == 1:
        return mixed(q, k, v, visible)

    @jax.checkpoint
    def of_piece(piece: tuple[Array, Array]) -> Array:
        q, visible = piece
        return mixed(q, k, v, visible)

    return join(jax.lax.map(of_piece, (cut(q, pieces), cut(visible, pieces))))


class Attention(nn.Module):
    """Attention block. Parameters: the projections q_proj, k_proj, v_proj, o_proj, the norms q_norm and k_norm
    (`qk_norm`), the sub norm (placement "sub") and, for kind "binary", `probability_scale` [].

    Call args:
      x: [B, T, D].
      positions: [B, T], for the rotary embedding.
      visible: [B, T, S], True where query i may attend to key j. S is T, or the capacity of the cache.
      key_mask: [B, T], False for padding among the new tokens. Causal "linear" attention uses this instead of
        `visible`, since its state covers all earlier tokens.
      cache, length: the cache and its number of written positions, [] or [B].
      rows: [B], the rows that the sequences have in a larger cache, see `extend_and_attend`; "softmax" only.

    Returns: y [B, T, D] and the updated cache (None without a cache).
    """

    config: TransformerShape
    precisions: Mapping[str, Precision]
    rotary: bool = True  # False: a layer of config.no_rope_layers

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
        rows: Int[Array, "B"] | None = None,
        progress: Float[Array, ""] | float = 1.0,
    ) -> tuple[Float[Array, "B T D"], KVCache | LinearState | None]:
        config, kind = self.config, self.config.attention
        B, T, D = x.shape

        counts = {"q_proj": config.num_heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
        linears = [
            BitLinear.of(config, count * config.head_size, self.precisions[name], name)
            for name, count in counts.items()
        ]
        q, k, v = (y.reshape(B, T, -1, config.head_size) for y in apply_fused(linears, x, progress))
        self.sow("intermediates", "qkv", (q, k, v))  # stored only if the caller requests it (distillation)
        if config.qk_norm:
            q, k = block_norm(config, "q_norm")(q), block_norm(config, "k_norm")(k)
        # In generation the kernel rotates, which it does in float32, and keeps what it writes as it is.
        by_kernel = (
            kind == "softmax" and cache is not None and x.dtype == jnp.float32 and config.kv_bits is None
        )
        turns = None
        if config.position == "rope" and self.rotary:
            theta, scaling = config.rope_theta, config.rope_scaling
            if by_kernel:
                turns = angles(positions, config.head_size, theta, scaling)
            else:
                q, k = rotate(q, positions, theta, scaling), rotate(k, positions, theta, scaling)
        if config.kv_bits is not None:
            k, v = fake_quantized_kv(k, config.kv_bits), fake_quantized_kv(v, config.kv_bits)

        if cache is None:
            k, v = whole_sequence(k), whole_sequence(v)
        if kind == "linear":
            if isinstance(cache, KVCache):
                raise TypeError(
                    "linear attention: got a KVCache, expected a LinearState; use the cache of this model"
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
                    f"{kind} attention: got a LinearState, expected a KVCache; use the cache of this model"
                )

            weigh = MIXING_WEIGHTS[kind]
            if kind == "binary":
                # BiT initializes to 4 times the mean of P, which is 1/S for a row over S keys.
                init = nn.initializers.constant(4.0 / config.max_length)
                a = self.param("probability_scale", init, (), jnp.float32)
                weigh = partial(weigh, probability_scale=a)

            def mixed(q: Array, k: Array, v: Array, visible: Array) -> Array:
                return mix_values(weigh(q, k, visible, config.score_scale, progress), v.astype(q.dtype))

            if cache is None and kind == "softmax" and x.dtype == jnp.float32 and on_one_device():
                o = softmax_attention(q, k, v, visible, config.score_scale)
            elif cache is None:
                o = in_pieces(mixed, q, k, v, visible)
            elif length is None:
                raise ValueError("got a cache without its length; pass the number of written positions")
            elif rows is not None and kind != "softmax":
                raise ValueError(f"got rows of a cache for {kind} attention, expected softmax attention")
            elif kind == "softmax":
                o, cache = extend_and_attend(
                    q, k, v, cache, visible, config.score_scale, length=length, rows=rows, angles=turns
                )
                o = o.astype(q.dtype)
            else:
                cache = write(cache, k, v, length)
                o = mixed(q, *cached_keys_values(cache), visible)

        o = sub_norm(config, o.reshape(B, T, config.num_heads * config.head_size), progress)
        return BitLinear.of(config, D, self.precisions["o_proj"], "o_proj")(o, progress), cache
