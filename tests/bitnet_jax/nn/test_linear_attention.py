"""Linear attention: hand-computed values, equality of the three forms, masks, states, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.nn import linear_attention as la

B, T, H, h = 2, 11, 2, 4
# Compiled once for all tests; the last test compares with the uncompiled functions.
parallel, recurrent = jax.jit(la.parallel), jax.jit(la.recurrent)
chunked = jax.jit(la.chunked, static_argnames="chunk")
# Sums of at most T h products of numbers around 1 in a different order, then one division: tens of 2^-24.
SAME = {"rtol": 1e-5, "atol": 1e-5}


def qkv(seed: int = 0, tokens: int = T) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(
        jax.random.normal(key, (B, tokens, H, h)) for key in jax.random.split(jax.random.key(seed), 3)
    )


def visible(key_mask: jax.Array) -> jax.Array:
    return jnp.tril(jnp.ones((1, key_mask.shape[1], key_mask.shape[1]), bool)) & key_mask[:, None, :]


FORMS = {"recurrent": recurrent, "chunked": chunked}
ALL = jnp.ones((B, T), bool)
LEFT_PADDED = jnp.asarray([[False] * 3 + [True] * (T - 3), [True] * T])


def test_two_tokens_by_hand():
    # h = 1; phi(0) = 1, phi(1) = 2, phi(-log 2) = 1/2.
    q = jnp.asarray([0.0, 1.0]).reshape(1, 2, 1, 1)
    k = jnp.asarray([1.0, -np.log(2)]).reshape(1, 2, 1, 1)
    v = jnp.asarray([10.0, 30.0]).reshape(1, 2, 1, 1)
    # Token 0 sees k_0: 1*2*10 / 1*2. Token 1 sees both: (2*2*10 + 2*0.5*30) / (2*2 + 2*0.5).
    o, state = recurrent(q, k, v, la.zero_state(1, 1, 1))
    np.testing.assert_allclose(o.ravel(), [10.0, 70.0 / 5.0], rtol=2e-6)  # epsilon is 5e-7 of the denominator
    np.testing.assert_allclose(state.s.ravel(), [2 * 10 + 0.5 * 30], rtol=1e-6)
    np.testing.assert_allclose(state.z.ravel(), [2.5], rtol=1e-6)


def test_parallel_matches_the_float64_formula():
    q, k, v = (np.asarray(x, np.float64) for x in qkv())
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))  # noqa: E731
    expected = np.zeros_like(v)
    for b, i, head in np.ndindex(B, T, H):
        a = [phi(q[b, i, head]) @ phi(k[b, j, head]) for j in range(i + 1)]
        expected[b, i, head] = sum(a[j] * v[b, j, head] for j in range(i + 1)) / (sum(a) + 1e-6)
    np.testing.assert_allclose(parallel(*qkv(), visible(ALL)), expected, **SAME)


@pytest.mark.parametrize("chunk", [1, 4, T, 64])
def test_three_forms_agree(chunk):
    q, k, v = qkv()
    zero = la.zero_state(B, H, h)
    for mask in (ALL, LEFT_PADDED):
        whole = parallel(q, k, v, visible(mask))
        one_by_one, state = recurrent(q, k, v, zero, mask)
        in_chunks, chunk_state = chunked(q, k, v, zero, mask, chunk=chunk)
        np.testing.assert_allclose(one_by_one, whole, **SAME)
        np.testing.assert_allclose(in_chunks, whole, **SAME)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME), chunk_state, state)


@pytest.mark.parametrize("split", [1, 10])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_two_calls_that_pass_the_state_equal_one_call(form, split):
    q, k, v = qkv(1)
    parts = [tuple(x[:, part] for x in (q, k, v)) for part in (slice(None, split), slice(split, None))]
    masks = LEFT_PADDED[:, :split], LEFT_PADDED[:, split:]
    first, state = FORMS[form](*parts[0], la.zero_state(B, H, h), masks[0])
    second, _ = FORMS[form](*parts[1], state, masks[1])
    whole = parallel(q, k, v, visible(LEFT_PADDED))
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, **SAME)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])
def test_padding_gives_zeros_and_no_gradient(form):
    def run(q, k, v):
        if form == "parallel":
            return parallel(q, k, v, visible(LEFT_PADDED))
        return FORMS[form](q, k, v, la.zero_state(B, H, h), LEFT_PADDED)[0]

    o, pullback = jax.vjp(run, *qkv(3))
    np.testing.assert_array_equal(o[0, :3], 0.0)  # fully masked queries
    dq, dk, dv = pullback(jnp.ones_like(o))
    assert all(np.isfinite(g).all() for g in (dq, dk, dv))
    for g in (dq, dk, dv):
        np.testing.assert_array_equal(g[0, :3], 0.0)
        assert np.any(g[0, 4] != 0.0)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_later_tokens_have_zero_gradient(form):
    at = 5

    def output(k, v):
        q = qkv(4)[0]
        extra = {"chunk": 4} if form == "chunked" else {}
        return FORMS[form](q, k, v, la.zero_state(B, H, h), **extra)[0][:, at].sum()

    for g in jax.grad(output, (0, 1))(*qkv(4)[1:]):
        np.testing.assert_array_equal(g[:, at + 1 :], 0.0)
        assert np.all(np.any(g[:, : at + 1] != 0.0, axis=(2, 3)))


def test_gradients_of_the_forms_agree():
    def loss(form):
        def of(q, k, v):
            return jnp.sum(jnp.sin(form(q, k, v)))

        return jax.grad(of, (0, 1, 2))(*qkv(5))

    zero = la.zero_state(B, H, h)
    expected = loss(lambda q, k, v: parallel(q, k, v, visible(ALL)))
    for form in (lambda *x: recurrent(*x, zero)[0], lambda *x: chunked(*x, zero, chunk=4)[0]):
        for got, want in zip(loss(form), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # differences of similar sums


def test_bidirectional_queries_attend_to_all_visible_keys():
    q, k, v = qkv(6)
    both = jnp.broadcast_to(LEFT_PADDED[:, None, :], (B, T, T))
    o = parallel(q, k, v, both)
    # The last causal query sees every real key, like all queries of the bidirectional form.
    causal = parallel(q, k, v, visible(LEFT_PADDED))
    np.testing.assert_allclose(o[:, -1], causal[:, -1], **SAME)
    # A constant value is its own average; epsilon over a sum of similarities above 1.
    np.testing.assert_allclose(parallel(q, k, jnp.full_like(v, 2.5), both), 2.5, rtol=2e-6)


def test_dtypes_and_bfloat16_error():
    low = tuple(x.astype(jnp.bfloat16) for x in qkv(7))
    o, state = chunked(*low, la.zero_state(B, H, h))
    assert o.dtype == jnp.bfloat16
    assert state.s.dtype == state.z.dtype == jnp.float32
    # Everything inside is float32: the same inputs, and one final rounding of outputs below 4.
    exact, _ = chunked(*(x.astype(jnp.float32) for x in low), la.zero_state(B, H, h))
    np.testing.assert_allclose(o.astype(jnp.float32), exact, atol=4 * 2.0**-9)


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk=0, expected a positive"):
        chunked(*qkv(), la.zero_state(B, H, h), chunk=0)


def test_jit_equals_no_jit_and_vmap_equals_loop():
    stacked = tuple(jnp.stack(xs) for xs in zip(qkv(8), qkv(9), strict=True))
    zero = la.zero_state(B, H, h)

    def run(q, k, v):
        return chunked(q, k, v, zero, LEFT_PADDED, 4)[0]

    loop = jnp.stack([run(*qkv(seed)) for seed in (8, 9)])
    np.testing.assert_allclose(jax.vmap(run)(*stacked), loop, **SAME)
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(*stacked), loop, **SAME)
