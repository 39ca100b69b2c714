"""Attention in pieces of the queries: the same values and gradients, without all scores in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.nn import attention as at
from bitnet_jax.nn.attention import mix_values

# Sums of tens of float32 numbers of magnitude 1 in a different order.
SAME = {"rtol": 1e-5, "atol": 1e-5}


def test_scores_in_pieces_give_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 8, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (2, 8, 8))

    def mixed(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        return mix_values(at.softmax(q, k, visible, 0.5), v)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(at.in_pieces(mixed, q, k, v, visible)))

    whole, expected = at.in_pieces(mixed, q, k, v, visible), jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(at, "MOST_SCORES", 2 * 4 * 2 * 8)
    np.testing.assert_allclose(at.in_pieces(mixed, q, k, v, visible), whole, **SAME)
    text = str(jax.make_jaxpr(jax.grad(loss))(q, k, v))
    assert "f32[2,4,2,8]" in text
    assert "f32[2,4,8,8]" not in text
    for a, b in zip(jax.grad(loss, (0, 1, 2))(q, k, v), expected, strict=True):
        np.testing.assert_allclose(a, b, **SAME)
