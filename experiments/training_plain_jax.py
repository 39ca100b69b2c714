"""The float32 model of `training_cost --compare torch` in plain JAX, as one writes it by hand, without this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

VOCABULARY = 256


def init(hidden: int, ffn: int, layers: int) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 1 + 7 * layers))

    def matrix(inputs: int, outputs: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), (inputs, outputs))

    def block() -> dict[str, jax.Array]:
        shapes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        shapes |= {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)}
        norms = {name: jnp.ones(hidden) for name in ("attention_norm", "ffn_norm")}
        return {name: matrix(*shape) for name, shape in shapes.items()} | norms

    return {
        "embedding": matrix(VOCABULARY, hidden),
        "blocks": [block() for _ in range(layers)],
        "norm": jnp.ones(hidden),
    }


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain


def rotate(x: jax.Array) -> jax.Array:
    length, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate((left * cos - right * sin, right * cos + left * sin), -1)


def loss(params: dict[str, Any], tokens: jax.Array, heads: int) -> jax.Array:
    x = params["embedding"][tokens[:, :-1]]
    batch, length, hidden = x.shape
    for block in params["blocks"]:
        y = rms_norm(x, block["attention_norm"])
        q, k, v = ((y @ block[name]).reshape(batch, length, heads, -1) for name in ("q", "k", "v"))
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + mixed.reshape(batch, length, hidden) @ block["o"]
        y = rms_norm(x, block["ffn_norm"])
        x = x + (jax.nn.silu(y @ block["gate"]) * (y @ block["up"])) @ block["down"]
    logits = rms_norm(x, params["norm"]) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_step(
    hidden: int, ffn: int, layers: int, heads: int, batch: int, length: int
) -> Callable[[], jax.Array]:
    """A function that trains one step on the same random tokens and returns the loss."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
    )
    params = init(hidden, ffn, layers)
    state = [params, optimizer.init(params)]
    tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, VOCABULARY)

    def update(params: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, tokens, heads)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def step() -> jax.Array:
        *state[:], value = compiled(*state)
        return value

    return step
