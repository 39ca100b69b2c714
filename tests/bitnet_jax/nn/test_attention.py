"""Attention: every kind against hand-computed values, heads, masks, caches, gradients, dtypes."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig
from bitnet_jax.nn import attention as at
from bitnet_jax.nn.attention import Attention
from bitnet_jax.nn.kv_cache import KVCache, fake_quantized_kv, quantize_kv
from bitnet_jax.nn.linear_attention import zero_state

B, T, H, K, h = 2, 6, 4, 2, 4
D = 16
KINDS = ["softmax", "relu", "linear", "binary_qk", "binary"]
SCORED = list(at.MIXING_WEIGHTS)
# Sums of tens of float32 numbers of magnitude 1 in a different order.
SAME = {"rtol": 1e-5, "atol": 1e-5}
ALL = jnp.ones((B, T), bool)
LEFT_PADDED = jnp.asarray([[False, False] + [True] * (T - 2), [True] * T])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# Compiled once for all tests; a test below compares with the uncompiled module.
COMPILED = {kind: jax.jit(f, static_argnames=("scale", "progress")) for kind, f in at.MIXING_WEIGHTS.items()}
mix_values = jax.jit(at.mix_values)


def weigh(kind: str):
    extra = {"probability_scale": jnp.float32(0.3)} if kind == "binary" else {}
    return partial(COMPILED[kind], **extra)


def causal(key_mask: jax.Array) -> jax.Array:
    return jnp.tril(jnp.ones((1, key_mask.shape[1], key_mask.shape[1]), bool)) & key_mask[:, None, :]


def tokens(*rows: list[float]) -> jax.Array:
    """One sequence with one head: [1, T, 1, h]."""
    return jnp.asarray(rows)[None, :, None, :]


# --- hand-computed values of each kind


def test_softmax_by_hand():
    # Scores 0 and log 3.
    p = weigh("softmax")(tokens([2.0]), tokens([0.0], [np.log(3)]), jnp.ones((1, 1, 2), bool), 0.5)
    np.testing.assert_allclose(p.ravel(), [0.25, 0.75], rtol=1e-6)


def test_relu_by_hand_divides_by_the_number_of_visible_keys():
    q, k = tokens([1.0]), tokens([2.0], [-1.0], [4.0])
    p = weigh("relu")(q, k, jnp.ones((1, 1, 3), bool), 0.5)
    np.testing.assert_allclose(p.ravel(), [1 / 3, 0.0, 2 / 3], rtol=1e-6)
    p = weigh("relu")(q, k, jnp.asarray([[[True, True, False]]]), 0.5)
    np.testing.assert_allclose(p.ravel(), [1 / 2, 0.0, 0.0], rtol=1e-6)


Q, KEYS = (
    [3.0, -1.0],
    ([0.5, 0.5], [1.0, -3.0]),
)  # mean magnitudes 2; 0.5 and 2. Signs agree in 1 and 2 channels.


def test_binary_qk_by_hand():
    # Scores 2 * 0.5 * (1 - 1) = 0 and 2 * 2 * (1 + 1) = 8.
    p = weigh("binary_qk")(tokens(Q), tokens(*KEYS), jnp.ones((1, 1, 2), bool), float(np.log(3)) / 8)
    np.testing.assert_allclose(p.ravel(), [0.25, 0.75], rtol=1e-5)


@pytest.mark.parametrize(("a", "expected"), [(0.6, [0.0, 0.6]), (0.4, [0.4, 0.4]), (1.6, [0.0, 0.0])])
def test_binary_by_hand(a, expected):
    # Scores 0 and 2 without magnitudes: P = 1/4 and 3/4, which become a where they exceed a / 2.
    p = COMPILED["binary"](
        tokens(Q),
        tokens(*KEYS),
        jnp.ones((1, 1, 2), bool),
        float(np.log(3)) / 2,
        probability_scale=jnp.float32(a),
    )
    np.testing.assert_allclose(p.ravel(), expected, rtol=1e-6)


def test_binary_kinds_ignore_magnitudes_as_documented():
    q, k = normal(0, B, T, H, h), normal(1, B, T, K, h)
    visible = causal(LEFT_PADDED)
    signs = jnp.where(q >= 0, 1.0, -1.0), jnp.where(k >= 0, 1.0, -1.0)
    np.testing.assert_array_equal(weigh("binary")(q, k, visible, 0.5), weigh("binary")(*signs, visible, 0.5))
    means = (jnp.mean(jnp.abs(x), axis=-1, keepdims=True) for x in (q, k))
    scaled = (s * m for s, m in zip(signs, means, strict=True))
    np.testing.assert_allclose(
        weigh("binary_qk")(q, k, visible, 0.5), weigh("softmax")(*scaled, visible, 0.5), **SAME
    )


def test_binary_probabilities_have_two_values():
    p = weigh("binary")(normal(2, B, T, H, h), normal(3, B, T, K, h), causal(LEFT_PADDED), 0.5)
    np.testing.assert_array_equal(np.unique(p), np.float32([0.0, 0.3]))


def test_clipped_sign_window_bounds_the_gradient_to_q():
    def total(x):
        q = tokens([x, 0.5])
        p = weigh("binary_qk")(q, tokens([1.0, 1.0], [-1.0, 0.2]), jnp.ones((1, 1, 2), bool), 1.0)
        return p[0, 0, 0, 0]

    inside, outside = jax.grad(total)(0.9), jax.grad(total)(1.1)
    assert inside > 0.01  # moving the sign towards the first key raises its weight
    assert outside == 0.0


# --- all score-based kinds


def test_query_head_j_uses_kv_head_j_over_group():
    q, k, v = normal(4, B, T, H, h), normal(5, B, T, K, h), normal(6, B, T, K, h)
    visible = causal(LEFT_PADDED)
    o = mix_values(weigh("softmax")(q, k, visible, 0.5), v)
    for j in range(H):
        head = j // (H // K)
        one = weigh("softmax")(q[:, :, j : j + 1], k[:, :, head : head + 1], visible, 0.5)
        alone = mix_values(one, v[:, :, head : head + 1])
        np.testing.assert_allclose(o[:, :, j], alone[:, :, 0], **SAME)


def test_mix_values_by_hand():
    p = jnp.asarray([[1.0, 0.0], [0.25, 0.75]])[None, None]
    o = mix_values(p, tokens([4.0, 8.0], [0.0, 4.0]))
    np.testing.assert_array_equal(o[0, :, 0], [[4.0, 8.0], [1.0, 5.0]])


@pytest.mark.parametrize("kind", SCORED)
def test_masked_keys_have_zero_weight_and_fully_masked_queries_zero_gradient(kind):
    visible = causal(LEFT_PADDED)  # the first two queries of row 0 see no key
    v = normal(9, B, T, K, h)

    def output(q, k):
        return mix_values(weigh(kind)(q, k, visible, 0.5), v)

    @jax.jit
    def gradients(q, k, do):
        return jax.vjp(output, q, k)[1](do)

    q, k = normal(7, B, T, H, h), normal(8, B, T, K, h)
    p = weigh(kind)(q, k, visible, 0.5)
    np.testing.assert_array_equal(jnp.where(visible[:, None], 0.0, p), 0.0)
    o = output(q, k)
    np.testing.assert_array_equal(o[0, :2], 0.0)
    dq, dk = gradients(q, k, normal(10, *o.shape))
    assert np.isfinite(dq).all()
    assert np.isfinite(dk).all()
    np.testing.assert_array_equal(dq[0, :2], 0.0)
    np.testing.assert_array_equal(dk[0, :2], 0.0)
    assert np.any(dq[0, 3] != 0.0)


def test_softmax_rows_sum_to_one_at_extreme_scores():
    q, k = 1e3 * normal(11, B, T, H, h), 1e3 * normal(12, B, T, K, h)
    p = weigh("softmax")(q, k, causal(LEFT_PADDED), 1.0)
    rows = jnp.where(jnp.any(causal(LEFT_PADDED), axis=-1), 1.0, 0.0)
    np.testing.assert_allclose(jnp.sum(p, -1), jnp.broadcast_to(rows[:, None], (B, H, T)), rtol=1e-6)


def test_softmax_matches_the_float64_formula():
    q, k = (np.asarray(x, np.float64) for x in (normal(13, 1, T, 1, h), normal(14, 1, T, 1, h)))
    e = np.exp(q[0, :, 0] @ k[0, :, 0].T / np.sqrt(h)) * np.tril(np.ones((T, T)))
    p = weigh("softmax")(
        normal(13, 1, T, 1, h), normal(14, 1, T, 1, h), causal(jnp.ones((1, T), bool)), h**-0.5
    )
    np.testing.assert_allclose(p[0, 0], e / e.sum(-1, keepdims=True), **SAME)


@pytest.mark.parametrize("kind", ["softmax", "relu", "binary_qk"])
def test_bfloat16_scores_are_summed_in_float32(kind):
    q, k, v = (normal(s, B, T, n, h).astype(jnp.bfloat16) for s, n in ((15, H), (16, K), (17, K)))
    visible = causal(LEFT_PADDED)
    p = weigh(kind)(q, k, visible, 0.5)
    assert p.dtype == jnp.float32
    exact = weigh(kind)(q.astype(jnp.float32), k.astype(jnp.float32), visible, 0.5)
    np.testing.assert_allclose(p, exact, **SAME)  # products of bfloat16 are exact in float32
    o = mix_values(p, v)
    assert o.dtype == jnp.bfloat16
    # P and o are rounded to 8 bits each; |v| < 4 and P sums to at most about 2.
    band = mix_values(exact, v.astype(jnp.float32))
    np.testing.assert_allclose(o.astype(jnp.float32), band, atol=2 * 8 * 2.0**-9)


# --- the module


def config(kind: str, **changes) -> ModelConfig:
    fields = {
        "vocab_size": 8, "hidden_size": D, "num_layers": 1, "num_heads": H, "num_kv_heads": K, "ffn_size": D,
        "max_length": 4, "attention": kind, "precision": "float32",
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def module(config: ModelConfig) -> Attention:
    resolved = config.precisions()
    return Attention(
        config, {n: resolved[f"layers_0/attention/{n}"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    )


@partial(jax.jit, static_argnums=0)
def run(config: ModelConfig, v: dict, x: jax.Array, call: dict) -> tuple:
    return module(config).apply(v, x, **call)


@lru_cache
def variables(config: ModelConfig) -> dict:
    """Parameters large enough for every part of the module to affect the output."""
    params = jax.jit(module(config).init)(jax.random.key(0), normal(0, B, T, D), **seeing(LEFT_PADDED))
    return jax.tree.map(lambda x: x * 15 if x.ndim == 2 else x, params)  # std 0.02 -> 0.3, about 1 / sqrt(D)


def seeing(mask: jax.Array, causally: bool = True) -> dict[str, jax.Array]:
    """The arguments of a call without a cache."""
    everything = jnp.broadcast_to(mask[:, None, :], (*mask.shape, mask.shape[1]))
    return {
        "positions": jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0),
        "visible": causal(mask) if causally else everything,
        "key_mask": mask,
    }


def cached(c: ModelConfig, v: dict, x: jax.Array, split: list[int], room: int) -> np.ndarray:
    """The module applied to pieces of x, left padded, with a cache of `room` positions."""
    empty = jnp.zeros((B, room, K, h))
    cache = zero_state(B, H, h) if c.attention == "linear" else KVCache(empty, empty)
    # Sliced in NumPy: JAX would compile each slice.
    x, mask, whole = np.asarray(x), np.asarray(LEFT_PADDED), jax.tree.map(np.asarray, seeing(LEFT_PADDED))
    visible, outputs = np.pad(whole["visible"], [(0, 0), (0, 0), (0, room - T)]), []
    for start, stop in zip([0, *split], [*split, T], strict=True):
        call = {
            "positions": whole["positions"][:, start:stop],
            "visible": visible[:, start:stop],
            "key_mask": mask[:, start:stop],
            "cache": cache,
            "length": np.int32(start),
        }
        y, cache = run(c, v, x[:, start:stop], call)
        outputs.append(y)
    return np.concatenate(outputs, axis=1)


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("kind", KINDS)
def test_cache_equals_no_cache_for_any_split(kind):
    c = config(kind)
    v, x = variables(c), normal(20, B, T, D)
    y, nothing = run(c, v, x, seeing(LEFT_PADDED))
    assert nothing is None
    for split in ([3], [1, 2, 3, 4, 5], [3, 4, 5], [1, 2, 3]):  # pieces of one and of three tokens
        np.testing.assert_allclose(cached(c, v, x, split, room=T + 2), y, **SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind):
    c = config(kind)
    v, x = variables(c), normal(21, B, T, D)
    shifted = jnp.roll(x, -2, axis=1)  # the two padded tokens, now later than all others
    padded, plain = run(c, v, x, seeing(LEFT_PADDED))[0], run(c, v, shifted, seeing(ALL))[0]
    np.testing.assert_allclose(padded[0, 2:], plain[0, :-2], **SAME)


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_exactly_the_visible_tokens_and_every_parameter(kind):
    c, seen = config(kind, norm_placement="sub"), 4

    def output(v, x):
        return jnp.sum(jnp.sin(module(c).apply(v, x, **seeing(LEFT_PADDED))[0][:, seen]))

    to_v, to_x = jax.jit(jax.grad(output, (0, 1)))(variables(c), normal(22, B, T, D))
    np.testing.assert_array_equal(to_x[:, seen + 1 :], 0.0)  # causality
    np.testing.assert_array_equal(to_x[0, :2], 0.0)  # padding
    assert np.all(np.any(to_x[0, 2 : seen + 1] != 0.0, axis=-1))
    assert np.all(np.any(to_x[1, : seen + 1] != 0.0, axis=-1))
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "sub_norm"}
    assert set(to_v["params"]) == names | ({"probability_scale"} if kind == "binary" else set())
    for leaf in jax.tree.leaves(to_v):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0.0)


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_attention_is_permutation_equivariant_and_ignores_padding(kind):
    c = config(kind, causal=False, position="none")
    v, x, order = variables(c), normal(23, B, T, D), jnp.asarray([3, 0, 5, 1, 4, 2])
    call = seeing(ALL, causally=False)
    y = run(c, v, x, call)[0]
    np.testing.assert_allclose(run(c, v, x[:, order], call)[0], y[:, order], **SAME)
    padded = run(c, v, x, seeing(LEFT_PADDED, causally=False))[0]
    other = run(c, v, x.at[0, :2].set(9.0), seeing(LEFT_PADDED, causally=False))[0]
    np.testing.assert_array_equal(padded[0, 2:], other[0, 2:])
    assert np.max(np.abs(padded[0, 2:] - y[0, 2:])) > 1e-3
    np.testing.assert_allclose(padded[1], y[1], **SAME)


def test_sub_norm_only_in_its_placement():
    for placement in ("sub", "pre", "inside"):
        names = variables(config("softmax", norm_placement=placement))["params"]
        assert ("sub_norm" in names) == (placement == "sub")


def test_score_scale_and_rope_come_from_the_config():
    v, x = variables(config("softmax")), normal(25, B, T, D)

    def changed(**changes):
        return module(config("softmax", **changes)).apply(v, x, **seeing(ALL))[0]

    np.testing.assert_array_equal(changed(), changed(attention_scale=h**-0.5))
    for difference in ({"attention_scale": 1.0}, {"rope_theta": 100.0}, {"position": "none"}):
        assert np.max(np.abs(changed(**difference) - changed())) > 1e-3


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("kind", KINDS)
def test_jit_equals_no_jit_and_vmap_equals_loop(kind):
    c = config(kind)
    v, x = variables(c), normal(26, 2, B, T, D)
    loop = jnp.stack([module(c).apply(v, xs, **seeing(LEFT_PADDED))[0] for xs in x])
    together = jax.vmap(lambda xs: run(c, v, xs, seeing(LEFT_PADDED))[0])(x)
    np.testing.assert_allclose(together, loop, **SAME)


@pytest.mark.parametrize("kind", ["softmax", "relu", "linear"])
def test_bfloat16_error_is_within_its_expected_range(kind):
    high, low = config(kind, norm_placement="pre"), config(kind, norm_placement="pre", dtype="bfloat16")
    v, x, call = variables(high), normal(27, B, T, D), seeing(LEFT_PADDED)
    y = run(low, v, x.astype(jnp.bfloat16), call)[0]
    assert y.dtype == jnp.bfloat16
    error = y.astype(jnp.float32) - module(high).apply(v, x, **call)[0]
    # About eight roundings of 2^-9 separate x and y, each of a number of magnitude 1 and spread over sums that
    # average them: a mean error of 2 % of y would be a defect, 0.1 % would be luck.
    size = np.std(y.astype(jnp.float32))
    assert 1e-3 * size < np.sqrt(np.mean(np.square(error))) < 2e-2 * size


def test_bfloat16_cache_with_a_float32_model():
    c = config("softmax")
    v, x, call = variables(c), normal(28, B, T, D), seeing(LEFT_PADDED)
    empty = jnp.zeros((B, T, K, h), jnp.bfloat16)
    y, cache = run(c, v, x, call | {"cache": KVCache(empty, empty), "length": jnp.int32(0)})
    assert cache.k.dtype == jnp.bfloat16
    assert y.dtype == jnp.float32
    exact = module(c).apply(v, x, **call)[0]
    assert np.max(np.abs(y - exact)) < 2e-2 * np.max(np.abs(exact))  # keys and values rounded by 2^-9


def test_quantized_keys_and_values_err_by_at_most_half_a_step():
    x = normal(30, 3, 5, K, 16) * jnp.asarray([1e-6, 1.0, 1e6], jnp.float32)[:, None, None, None]
    x = x.at[0, 0, 0].set(0.0)
    codes, scale = quantize_kv(x)
    assert (codes.dtype, scale.shape) == (jnp.int8, x.shape[:-1])
    np.testing.assert_array_equal(jnp.max(jnp.abs(codes.astype(jnp.int32)), axis=-1) == 127, scale > 0)
    # Half a step, plus the rounding of x / scale (magnitude 127) and of the product.
    error = jnp.abs(codes.astype(jnp.float32) * scale[..., None] - x)
    assert np.all(error <= (0.5 + 127 * 2.0**-22) * scale[..., None])
    assert not codes[0, 0, 0].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_and_values_of_few_bits(bits):
    x, q = normal(31, 3, 5, K, 16), 2 ** (bits - 1) - 1
    codes, scale = quantize_kv(x, bits)
    assert set(np.unique(codes)) <= set(range(-q, q + 1))
    value, pull = jax.vjp(lambda x: fake_quantized_kv(x, bits), x)
    np.testing.assert_array_equal(value, codes.astype(jnp.float32) * scale[..., None])
    assert np.all(np.abs(value - x) <= 0.50001 * scale[..., None])  # half a step plus float32 rounding
    g = normal(32, *x.shape)
    np.testing.assert_array_equal(pull(g)[0], g)


def test_eight_bit_keys_and_values_without_a_cache_match_the_int8_cache():
    c = dataclasses.replace(config("softmax"), kv_bits=8)
    v, x, call = variables(c), normal(28, B, T, D), seeing(LEFT_PADDED)
    cached, _ = run(config("softmax"), v, x, call | {"cache": empty_cache(T, "int8"), "length": jnp.int32(0)})
    np.testing.assert_allclose(
        module(c).apply(v, x, **call)[0], cached, rtol=1e-5, atol=1e-6
    )  # summation order


def empty_cache(room: int, dtype: str) -> KVCache:
    values, scales = jnp.zeros((B, room, K, h), dtype), jnp.zeros((B, room, K))
    return KVCache(values, values, scales, scales) if dtype == "int8" else KVCache(values, values)


@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_the_error_of_an_int8_cache_is_bounded_by_its_step(kind):
    """softmax by the kernel and relu by XLA store the same codes."""
    c = config(kind)
    v, x, call = variables(c), normal(28, B, T, D), seeing(LEFT_PADDED)
    y, cache = run(c, v, x, call | {"cache": empty_cache(T, "int8"), "length": jnp.int32(0)})
    assert cache.k.dtype == cache.v.dtype == jnp.int8
    _, floats = run(c, v, x, call | {"cache": empty_cache(T, "float32"), "length": jnp.int32(0)})
    np.testing.assert_array_equal(cache.k, quantize_kv(floats.k)[0])
    np.testing.assert_array_equal(cache.v_scale, quantize_kv(floats.v)[1])
    exact = module(c).apply(v, x, **call)[0]
    error = np.max(np.abs(y - exact)) / np.max(np.abs(exact))
    # A step is 1/127 of the largest channel, so an error is at most 0.4 % of it in values and in scores.
    assert 0 < error < 2e-2


def test_more_tokens_than_the_cache_holds_are_rejected():
    c = config("softmax")
    empty = jnp.zeros((B, T - 1, K, h))
    call = seeing(LEFT_PADDED) | {"cache": KVCache(empty, empty), "length": jnp.int32(0)}
    with pytest.raises(ValueError, match="got 6 tokens for a cache of 5 positions"):
        run(c, variables(c), normal(29, B, T, D), call)


@pytest.mark.parametrize(
    ("kind", "cache", "length", "message"),
    [
        ("softmax", zero_state(B, H, h), 0, "softmax attention: got a LinearState"),
        ("linear", KVCache(*[jnp.zeros((B, T, K, h))] * 2), 0, "linear attention: got a KVCache"),
        ("softmax", KVCache(*[jnp.zeros((B, T, K, h))] * 2), None, "got a cache without its length"),
    ],
)
def test_a_mismatched_cache_is_rejected(kind, cache, length, message):
    c = config(kind)
    with pytest.raises((TypeError, ValueError), match=message):
        run(c, variables(c), normal(29, B, T, D), seeing(ALL) | {"cache": cache, "length": length})
