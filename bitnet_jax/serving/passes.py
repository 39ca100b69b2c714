"""The compiled passes of the engine over a cache of R rows, one request in each, as pure functions.

    read_tokens   the next tokens of one prompt, into its row
    decode        one token of some rows
    copy_row      the cache of one row into another
    row_of        one row of logits
    choose        the next token, from the logits of one row
    draft         the next tokens by prompt look-up
    score         ln P of given tokens, and the most likely ones

Other rows are neither computed nor changed. The shape of `read_tokens` follows from the prompt, that of `decode` from
how many answers run; with `rows_are_exact` the bits of a row do not depend on it, and without it R is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from bitnet_jax.inference import prompt_lookup, steps
from bitnet_jax.inference.sampling import Filters, SamplingConfig, next_token
from bitnet_jax.models import ModelConfig
from bitnet_jax.models.transformer import Cache
from bitnet_kernels import PackedArray, choose_implementation, cpu

Layers = tuple[Any, ...]  # of KVCache
TOP = 20  # most likely tokens that `score` returns, or the vocabulary if it is smaller
_GREEDY = SamplingConfig().filters()


def rows_are_exact(config: ModelConfig, variables: Mapping[str, Any]) -> bool:
    """Whether the bits of a row depend neither on other rows and their number nor on how a text is cut into passes.

    So it is where every sum is exact or in a fixed order: packed layers with int8 or int16 inputs, RMSNorm, softmax
    attention in float32 and a head that is packed or stored in bfloat16, all by the C++ kernels on a CPU. Elsewhere XLA
    chooses the order of a sum by the shapes of a program.
    """
    if jax.default_backend() != "cpu" or cpu.unavailable():
        return False
    if (config.attention, config.norm, config.dtype, config.kv_bits) != (
        "softmax",
        "rmsnorm",
        "float32",
        None,
    ):
        return False
    packed = variables.get("packed", {})

    def exact(path: str) -> bool:
        weight: Any = packed
        for name in (*path.split("/"), "weight"):
            weight = weight.get(name, {})
        return isinstance(weight, PackedArray) and choose_implementation(weight).isa is not None

    precisions = config.precisions()
    layers = all(exact(path) and p.absmax_bits for path, p in precisions.items() if path != "lm_head")
    name, leaf = ("embed", "embedding") if config.tie_embeddings else ("lm_head", "weight")
    table = variables["params"].get(name, {}).get(leaf)
    head = (table is not None and table.dtype == jnp.bfloat16) or exact("lm_head") or exact(name)
    return layers and head


def read_tokens(
    config: ModelConfig,
    every_position: bool,
    variables: steps.Variables,
    layers: Layers,
    row: Int[Array, ""],
    tokens: Int[Array, "W"],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[Float[Array, "N V"], Layers]:
    """Appends `count` tokens, padded to W, to the `start` tokens of a row.

    Returns: the logits after the last one, [1, V], or after every one, [W, V]; and the cache.
    """
    mask = jnp.arange(tokens.shape[0], dtype=jnp.int32) < count
    cache = _cache(layers, row[None], start[None])
    last = None if every_position else (count - 1)[None]
    logits, cache = steps.forward(config, variables, _GREEDY, tokens[None], cache, mask[None], read=last)
    return logits[0], cache.layers


def decode(
    config: ModelConfig,
    variables: steps.Variables,
    layers: Layers,
    rows: Int[Array, "B"],
    tokens: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], Layers]:
    """Appends one token to each of some rows, all different, of `lengths` tokens."""
    cache = _cache(layers, rows, lengths)
    logits, cache = steps.forward(config, variables, _GREEDY, tokens[:, None], cache)
    return logits[:, 0], cache.layers


def copy_row(layers: Layers, source: Int[Array, ""], target: Int[Array, ""]) -> Layers:
    def copied(x: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=0)

    return jax.tree.map(copied, layers)


def _cache(layers: Layers, rows: Int[Array, "B"], lengths: Int[Array, "B"]) -> Cache:
    R, S = layers[0].k.shape[:2]
    written = jnp.arange(S, dtype=jnp.int32)[None] < lengths[:, None]
    return Cache(layers, written, lengths, rows if R > 1 else None)


def row_of(logits: Float[Array, "N V"], row: Int[Array, ""]) -> Float[Array, "1 V"]:
    return jax.lax.dynamic_slice_in_dim(logits, row, 1, axis=0)


def choose(
    filters: Filters,
    logits: Float[Array, "1 V"],
    key: UInt32[Array, "2"],
    step: Int[Array, ""],
    added: Float[Array, "V"] | None,
    seen: Bool[Array, "V"] | None,
) -> Int[Array, ""]:
    """The token number `step` of an answer, as `steps.choose` chooses it for a batch of one.

    Args:
      key: the data of a random key.
      added: to the logits, before any filter.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    logits = logits if added is None else logits + added[None]
    return next_token(logits, key, filters, None if seen is None else seen[None])[0]


def draft(count: int, text: Int[Array, "S"], last: Int[Array, ""]) -> tuple[Int[Array, "N"], Bool[Array, ""]]:
    return prompt_lookup.draft(text, last, count)


class Scores(NamedTuple):
    log_probabilities: Float[Array | np.ndarray, "N"]
    top_tokens: Int[Array | np.ndarray, "N K"]
    top: Float[Array | np.ndarray, "N K"]


def score(logits: Float[Array, "N V"], targets: Int[Array, "N"]) -> Scores:
    """ln P of each target, and the TOP most likely tokens in its place: what the model itself says, before penalties
    and temperature."""

    def one(row: tuple[Array, Array]) -> Scores:
        log_probabilities = jax.nn.log_softmax(row[0].astype(jnp.float32))
        top, tokens = jax.lax.top_k(log_probabilities, min(TOP, row[0].shape[0]))
        return Scores(log_probabilities[row[1]], tokens, top)

    return jax.lax.map(one, (logits, targets))
