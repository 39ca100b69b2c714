"""Properties of the transformer, over attention kinds, norm placements and feed-forward kinds."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.models import ModelConfig
from bitnet_jax.models.transformer import Cache, Output, Transformer
from bitnet_jax.nn.kv_cache import KVCache
from bitnet_jax.nn.linear_attention import zero_state

V, H, K, h = 13, 4, 2, 4
T, ROOM = 5, 7
ATTENTIONS = ["softmax", "relu", "linear", "binary_qk", "binary"]
PLACEMENTS = ["sub", "pre", "inside"]
MLPS = ["relu", "relu2", "gelu", "silu_glu", "relu2_glu"]
# Every pair (attention, placement) and (placement, MLP) of the 1-bit papers, in 15 models, and BERT's.
TRIPLES = [
    (a, p, MLPS[(i + j) % 5])
    for (i, a), (j, p) in itertools.product(*map(enumerate, (ATTENTIONS, PLACEMENTS)))
] + [("softmax", "post", "gelu_erf")]
PER_KIND = [  # each attention kind and each MLP once
    *((a, PLACEMENTS[2 * i % 3], m) for i, (a, m) in enumerate(zip(ATTENTIONS, MLPS, strict=True))),
    ("softmax", "post", "gelu_erf"),
]
# Logits of magnitude 1 from one or two layers of float32 sums of at most 24 terms, in a different order.
SAME = {"rtol": 1e-4, "atol": 1e-4}

TOKENS = jnp.asarray([[3, 1, 4, 0, 5], [9, 2, 6, 8, 7]], jnp.int32)  # no token twice in a row
ALL = jnp.ones((2, T), bool)
LEFT_PADDED = jnp.asarray([[False, False, True, True, True], [True] * T])


def tiny(
    attention: str = "softmax", placement: str = "sub", mlp: str = "relu2_glu", **changes
) -> ModelConfig:
    # Weights of magnitude 1 / sqrt(D), so that every part affects the logits.
    fields = {
        "vocab_size": V, "hidden_size": H * h, "num_layers": 1, "num_heads": H, "num_kv_heads": K,
        "ffn_size": 24, "max_length": 8, "attention": attention, "norm_placement": placement, "mlp": mlp,
        "precision": "float32", "init_std": 0.25,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


@lru_cache
def variables(config: ModelConfig, seed: int = 0) -> dict:
    """Like init, except that NumPy draws the matrices: compiling an initializer takes XLA a second or more."""

    shapes = []

    @jax.jit
    def vectors() -> dict:
        init = Transformer(config).init(jax.random.key(0), TOKENS)
        shapes.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init))
        return jax.tree.map(lambda x: x if x.ndim < 2 else (), init)

    values = vectors()
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x, vector: (
            vector if x.ndim < 2 else jnp.asarray(random.normal(0, config.init_std, x.shape), x.dtype)
        ),
        shapes[0],
        values,
    )


@partial(jax.jit, static_argnums=0)
def compiled(config: ModelConfig, v: dict, tokens: jax.Array, arguments: dict) -> Output:
    return Transformer(config).apply(v, tokens, **arguments)


def apply(config: ModelConfig, v: dict, tokens: jax.Array, **arguments) -> Output:
    return compiled(config, v, tokens, arguments)


def logits(config: ModelConfig, v: dict, tokens: jax.Array, **arguments) -> jax.Array:
    return apply(config, v, tokens, **arguments).logits


def empty_cache(config: ModelConfig, batch: int) -> Cache:
    keys = jnp.zeros((batch, ROOM, K, h))
    layer = zero_state(batch, H, h) if config.attention == "linear" else KVCache(keys, keys)
    return Cache((layer,) * config.num_layers, jnp.zeros((batch, ROOM), bool), jnp.zeros((), jnp.int32))


def in_pieces(config: ModelConfig, v: dict, pieces: list[int], mask: jax.Array) -> jax.Array:
    """Logits of TOKENS, decoded through a cache in pieces of these lengths."""
    cache, outputs, start = empty_cache(config, TOKENS.shape[0]), [], 0
    for length in pieces:
        part = slice(start, start + length)
        output = apply(config, v, TOKENS[:, part], mask=mask[:, part], cache=cache)
        outputs.append(output.logits)
        cache, start = output.cache, start + length
    assert int(cache.length) == T
    np.testing.assert_array_equal(cache.valid, jnp.pad(mask, [(0, 0), (0, ROOM - T)]))
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.extended(after=5)
@pytest.mark.parametrize(("attention", "placement", "mlp"), TRIPLES[::3] + TRIPLES[1::3] + TRIPLES[2::3])
def test_logits_are_finite_and_causal_and_every_parameter_has_a_gradient(attention, placement, mlp):
    # Untied, the embedding of a token is used only at that token's positions.
    config = tiny(attention, placement, mlp, precision="bitnet_b158", tie_embeddings=False)
    seen = 3

    def output(v):
        out = Transformer(config).apply(v, TOKENS, mask=LEFT_PADDED).logits
        return jnp.sum(jnp.sin(out[:, seen])), out

    grads, out = jax.jit(jax.grad(output, has_aux=True))(variables(config))
    assert out.shape == (*TOKENS.shape, V)
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()
    assert np.std(out) > 0.1
    for path, g in flatten_dict(grads["params"], sep="/").items():
        assert np.isfinite(g).all(), path
        assert np.any(g != 0.0), path
    # Exactly zero at later tokens, padding and unused ids. (A ReLU score may be zero at an earlier token too.)
    to_embedding = grads["params"]["embed"]["embedding"]
    reached = set(np.flatnonzero(np.any(to_embedding != 0.0, axis=-1)).tolist())
    own, earlier = {0, 8}, {4, 9, 2, 6}
    assert reached <= own | earlier
    assert reached >= own
    assert reached & earlier


@pytest.mark.extended(after=2)
@pytest.mark.parametrize(("attention", "placement", "mlp"), PER_KIND)
def test_cache_equals_no_cache(attention, placement, mlp):
    config = tiny(attention, placement, mlp, num_layers=2)
    v = variables(config)
    whole = logits(config, v, TOKENS, mask=LEFT_PADDED)
    np.testing.assert_allclose(in_pieces(config, v, [1] * T, LEFT_PADDED), whole, **SAME)
    np.testing.assert_allclose(in_pieces(config, v, [3, 1, 1], LEFT_PADDED), whole, **SAME)


@pytest.mark.extended(after=2)
@pytest.mark.parametrize(("attention", "placement", "mlp"), PER_KIND)
def test_left_padding_changes_nothing(attention, placement, mlp):
    config = tiny(attention, placement, mlp)
    v = variables(config)
    padded = logits(config, v, TOKENS, mask=LEFT_PADDED)
    # The two padded tokens of row 0 moved after the others, where causality hides them.
    plain = logits(config, v, TOKENS.at[0].set(jnp.roll(TOKENS[0], -2)), mask=ALL)
    np.testing.assert_allclose(padded[0, 2:], plain[0, :-2], **SAME)
    np.testing.assert_allclose(padded[1], plain[1], **SAME)
    other = logits(config, v, jnp.where(LEFT_PADDED, TOKENS, 12), mask=LEFT_PADDED)
    np.testing.assert_array_equal(padded[LEFT_PADDED], other[LEFT_PADDED])


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_classifier_ignores_padding(attention):
    config = tiny(attention, causal=False, num_classes=3)
    v = variables(config)
    left = jnp.asarray([[12, 12, 3, 1, 4], [3, 1, 4, 0, 5]], jnp.int32)
    right = jnp.asarray([[3, 1, 4, 7, 7], [3, 1, 4, 0, 5]], jnp.int32)
    on_left, on_right = (
        logits(config, v, x, mask=m) for x, m in ((left, LEFT_PADDED), (right, LEFT_PADDED[:, ::-1]))
    )
    assert on_left.shape == (2, 3)
    np.testing.assert_allclose(on_left, on_right, **SAME)
    np.testing.assert_array_equal(on_left, logits(config, v, left.at[0, :2].set(7), mask=LEFT_PADDED))
    assert np.max(np.abs(on_left - logits(config, v, left.at[0, :2].set(7), mask=ALL))[0]) > 1e-3


def test_classifier_of_a_padded_row_equals_that_of_the_row_alone():
    config = tiny(causal=False, num_classes=3)
    v = variables(config)
    alone = logits(config, v, TOKENS[:1, 2:])
    np.testing.assert_allclose(logits(config, v, TOKENS, mask=LEFT_PADDED)[:1], alone, **SAME)


def test_classifier_is_bidirectional():
    config = tiny(causal=False, num_classes=3, position="none", norm_placement="pre")
    v = variables(config)
    # Without positions and with mean pooling, the order of tokens cannot matter, but the set of tokens does.
    np.testing.assert_allclose(logits(config, v, TOKENS), logits(config, v, TOKENS[:, ::-1]), **SAME)
    other = logits(config, v, TOKENS.at[:, 0].set(12))
    assert np.max(np.abs(other - logits(config, v, TOKENS))) > 1e-3


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("attention", ["softmax", "linear"])  # all kinds: nn/test_attention.py
def test_jit_equals_no_jit(attention):
    config = tiny(attention)
    v = variables(config)
    out = logits(config, v, TOKENS, mask=LEFT_PADDED, progress=0.5)
    np.testing.assert_allclose(out, Transformer(config).apply(v, TOKENS, mask=LEFT_PADDED).logits, **SAME)


def test_vmap_over_parameters_equals_a_loop():
    # Ternary weights: each model in the stack must have a separate scale.
    config = tiny(precision="bitnet_weight_only")
    models = [variables(config, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.jit(jax.vmap(lambda v: logits(config, v, TOKENS)))(stacked)
    np.testing.assert_allclose(together, jnp.stack([logits(config, v, TOKENS) for v in models]), **SAME)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("attention", ["softmax", "relu", "linear"])
def test_bfloat16_error_is_within_its_expected_range(attention):
    high, low = tiny(attention), tiny(attention, dtype="bfloat16")
    v = variables(high)
    exact, rounded = logits(high, v, TOKENS), logits(low, v, TOKENS)
    assert rounded.dtype == jnp.float32
    # About ten independent roundings of 2^-9 = 0.2 % with either sign: sqrt(10) * 0.2 % = 0.6 % of
    # the logits' spread is expected; below 0.1 % nothing was rounded, above 5 % something is wrong.
    error = np.sqrt(np.mean(np.square(rounded - exact))) / np.std(exact)
    assert 1e-3 < error < 5e-2


def test_parameter_paths_match_the_config():
    for changes in ({}, {"tie_embeddings": False}, {"num_classes": 3, "causal": False}, {"mlp": "relu2"}):
        config = tiny(**changes)
        params = flatten_dict(variables(config)["params"], sep="/")
        weights = {
            path.removesuffix("/weight"): w.shape for path, w in params.items() if path.endswith("/weight")
        }
        assert weights == config.linear_shapes()


def test_rope_depends_on_distances_and_learned_positions_on_positions():
    shifted = {"positions": jnp.broadcast_to(jnp.arange(2, 2 + T, dtype=jnp.int32), (2, T))}
    rope, learned = tiny(), tiny(position="learned")
    for config, same in ((rope, True), (learned, False)):
        v = variables(config)
        moved = np.max(np.abs(logits(config, v, TOKENS, **shifted) - logits(config, v, TOKENS)))
        assert (moved < 1e-3) == same  # float32 angles up to 7 radians


def test_dropout_is_off_by_default():
    config = tiny(dropout=0.5)
    v = variables(config)
    np.testing.assert_array_equal(logits(config, v, TOKENS), logits(tiny(), v, TOKENS))

    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return Transformer(config).apply(v, TOKENS, deterministic=False, rngs=rngs).logits

    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert np.max(np.abs(dropped(0) - dropped(1))) > 0.1


def test_embeddings_are_rounded_to_what_packing_stores():
    v = variables(tiny())
    rounded = jax.tree.map(lambda x: x, v)
    table = v["params"]["embed"]["embedding"]
    rounded["params"]["embed"] = {"embedding": table.astype(jnp.bfloat16).astype(jnp.float32)}
    low = logits(tiny(embedding_dtype="bfloat16"), v, TOKENS)
    np.testing.assert_array_equal(low, logits(tiny(), rounded, TOKENS))
    assert np.any(low != logits(tiny(), v, TOKENS))


@pytest.mark.parametrize("tied", [True, False])
def test_selected_positions_have_the_same_logits_and_hidden_states(tied: bool) -> None:
    config = tiny(tie_embeddings=tied)
    v = variables(config)
    read = jnp.asarray([T - 1, T - 2], jnp.int32)
    whole, one = (apply(config, v, TOKENS, mask=LEFT_PADDED, read=read) for read in (None, read))
    assert whole.hidden.shape == (2, T, H * h)
    rows = np.arange(2)
    np.testing.assert_allclose(one.logits[:, 0], whole.logits[rows, read], **SAME)
    np.testing.assert_array_equal(one.hidden[:, 0], whole.hidden[rows, read])
    head = v["params"]["embed"]["embedding"] if tied else v["params"]["lm_head"]["weight"]
    np.testing.assert_allclose(whole.hidden @ head.T, whole.logits, **SAME)


@pytest.mark.slow
@pytest.mark.slow(after=1)
@pytest.mark.parametrize("precision", ["bitnet_b158", "float32"])
def test_remat_changes_residuals_and_not_gradients(precision: str) -> None:
    config = tiny(precision=precision, num_layers=2, dropout=0.3)
    v, key = variables(config), jax.random.key(5)

    def loss(remat: bool, v: dict) -> jax.Array:
        model = Transformer(dataclasses.replace(config, remat=remat))
        return jnp.sum(model.apply(v, TOKENS, deterministic=False, rngs={"dropout": key}).logits ** 2)

    kept, again = (jax.grad(partial(loss, remat)) for remat in (False, True))
    jaxpr = str(jax.make_jaxpr(again)(v))
    assert "remat" in jaxpr or "checkpoint" in jaxpr
    # sums of a backward pass in a different order
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.jit(kept)(v),
        jax.jit(again)(v),
    )
