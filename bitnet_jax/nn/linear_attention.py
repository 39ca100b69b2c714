"""Linear attention (Katharopoulos et al. 2020, 2006.16236): attention with a state of constant size.

The similarity of query and key is `phi(q).phi(k)` with `phi(x) = elu(x) + 1 > 0`, which factorizes, so the sums
over keys can be carried as a state:

    S_i = S_{i-1} + phi(k_i) v_i^T        z_i = z_{i-1} + phi(k_i)
    o_i = S_i^T phi(q_i) / (z_i . phi(q_i) + 1e-6)

Three forms of the same function, equal up to the order of float32 summation:

    parallel    the masked product of all queries and keys; O(T S), any mask
    recurrent   one key at a time; O(1) memory per step: decoding
    chunked     parallel inside a chunk, recurrent between chunks; O(T chunk): training and prefill

A key whose mask is False adds nothing to the state. A query with no visible key gives zeros.
All arrays have the same number of heads; for grouped queries, repeat the kv heads first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bitnet_jax.quantization.scales import floats

EPSILON = 1e-6  # in the denominator, as in the authors' code
CHUNK = 64  # keys per chunk: makes the intra-chunk product about as large as the state of a typical head


class LinearState(NamedTuple):
    """Sums over past keys, float32: `s = sum_j phi(k_j) v_j^T` and `z = sum_j phi(k_j)`."""

    s: Float[Array, "B H h h"]
    z: Float[Array, "B H h"]


def zero_state(batch: int, heads: int, head_dim: int) -> LinearState:
    """The state before the first key."""
    return LinearState(
        jnp.zeros((batch, heads, head_dim, head_dim), jnp.float32),
        jnp.zeros((batch, heads, head_dim), jnp.float32),
    )


def phi(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """`elu(x) + 1` in float32: `x + 1` above zero, `exp(x)` below."""
    return jax.nn.elu(floats("x", x).astype(jnp.float32)) + 1.0


def phi_keys(k: Float[Array, "B S H h"], key_mask: Bool[Array, "B S"] | None) -> Float[Array, "B S H h"]:
    """phi(k), zero for padding keys (mask False)."""
    return phi(k) if key_mask is None else jnp.where(key_mask[:, :, None, None], phi(k), 0.0)


def parallel(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S H h"],
    v: Float[Array, "B S H h"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T H h"]:
    """`o_i = sum_j A_ij v_j / (sum_j A_ij + 1e-6)` with `A_ij = phi(q_i).phi(k_j)` where visible, else 0.

    Causal, padded and bidirectional attention differ only in `visible`.
    """
    similarity = jnp.einsum("bthd,bshd->bhts", phi(q), phi(k))
    similarity = jnp.where(visible[:, None], similarity, 0.0)
    mixed = jnp.einsum("bhts,bshe->bthe", similarity, floats("v", v).astype(jnp.float32))
    total = jnp.einsum("bhts->bth", similarity)
    return _normalize(mixed, total).astype(q.dtype)


def recurrent(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T H h"],
    v: Float[Array, "B T H h"],
    state: LinearState,
    key_mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H h"], LinearState]:
    """Causal attention token by token, starting from `state`; returns outputs and the final state."""

    def step(state: LinearState, token: tuple[Array, Array, Array]) -> tuple[LinearState, Array]:
        phi_q, phi_k, v = token  # [B, H, h] each
        state = LinearState(state.s + phi_k[..., :, None] * v[..., None, :], state.z + phi_k)
        mixed = jnp.einsum("bhd,bhde->bhe", phi_q, state.s)
        return state, _normalize(mixed, jnp.einsum("bhd,bhd->bh", phi_q, state.z))

    tokens = (phi(q), phi_keys(k, key_mask), floats("v", v).astype(jnp.float32))
    state, o = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), state


def chunked(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T H h"],
    v: Float[Array, "B T H h"],
    state: LinearState,
    key_mask: Bool[Array, "B T"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T H h"], LinearState]:
    """Causal attention chunk by chunk, starting from `state`; returns outputs and the final state.

    Any T: the last chunk is padded with keys that add nothing, and its surplus outputs are dropped. A single token is
    one chunk and equals one step of `recurrent`.

    Raises:
      ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}, expected a positive number of tokens")
    T = q.shape[1]
    chunk = min(chunk, T)
    not_later = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None]

    def step(state: LinearState, tokens: tuple[Array, Array, Array]) -> tuple[LinearState, Array]:
        phi_q, phi_k, v = tokens  # [B, chunk, H, h] each
        similarity = jnp.where(not_later, jnp.einsum("bthd,bshd->bhts", phi_q, phi_k), 0.0)
        mixed = jnp.einsum("bhts,bshe->bthe", similarity, v) + jnp.einsum("bthd,bhde->bthe", phi_q, state.s)
        total = jnp.einsum("bhts->bth", similarity) + jnp.einsum("bthd,bhd->bth", phi_q, state.z)
        state = LinearState(
            state.s + jnp.einsum("bshd,bshe->bhde", phi_k, v), state.z + jnp.einsum("bshd->bhd", phi_k)
        )
        return state, _normalize(mixed, total)

    def split(x: Array) -> Array:
        """[B, T, ...] -> [chunks, B, chunk, ...], zero-padded."""
        x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    tokens = (phi(q), phi_keys(k, key_mask), floats("v", v).astype(jnp.float32))
    if chunk == T:
        state, o = step(state, tokens)
        return o.astype(q.dtype), state
    state, o = jax.lax.scan(step, state, jax.tree.map(split, tokens))
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :T].astype(q.dtype), state


def _normalize(mixed: Float[Array, "*axes h"], total: Float[Array, "*axes"]) -> Float[Array, "*axes h"]:
    return mixed / (total[..., None] + EPSILON)
