"""The compiled parts of generation, as pure functions: reading the prompts, and the decode loop.

    prefill      reads the prompts and chooses the first token of each row
    with_room    makes room for the text
    advance      the decode loop

The position of a token is folded into its random key, so it does not matter how a text is cut into calls, and several
positions can be chosen from one pass (prompt_lookup.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitnet_jax.inference import exact_head, prompt_lookup
from bitnet_jax.inference.buckets import cache_capacity
from bitnet_jax.inference.cache import extend_cache, init_cache
from bitnet_jax.inference.sampling import Filters, next_token
from bitnet_jax.models import ModelConfig
from bitnet_jax.models.transformer import Cache, Transformer

Variables = Mapping[str, Any]


@flax.struct.dataclass
class State:
    """Generation after `step` tokens; the last one is chosen but not yet in the cache."""

    cache: Cache
    tokens: Int[Array, "B S"]  # S is the room of the cache
    lengths: Int[Array, "B"]
    step: Int[Array, ""]
    done: Bool[Array, "B"]  # rows that have reached an end token
    passes: Int[Array, ""]  # through the model, after the prompt
    seen: Bool[Array, "B V"] | None  # tokens of prompt and text; None without a repetition penalty
    text: Int[Array, "R"] | None  # prompt and text of the only row, R = S + 1; None without prompt look-up


def forward(
    config: ModelConfig,
    variables: Variables,
    filters: Filters,
    tokens: Array,
    cache: Cache,
    mask: Array | None = None,
    read: Array | None = None,
) -> tuple[Float[Array, "B T V"], Cache]:
    """Next-token logits, and the cache with all tokens [B, T] appended.

    Args:
      read: the only position of each row to compute logits for, [B]; None: all.
    """
    model = {name: leaves for name, leaves in variables.items() if name != exact_head.COLLECTION}
    output: Any = Transformer(config).apply(model, tokens, mask=mask, cache=cache, read=read)
    head = variables.get(exact_head.COLLECTION)
    if head is None:
        return output.logits, output.cache
    k = 1 if filters.temperature is None else filters.top_k
    B, T, D = output.hidden.shape
    logits = head.top_logits(output.hidden.reshape(B * T, D), k).logits
    return logits.reshape(B, T, -1), output.cache  # output.logits is unused, so never computed


def choose(
    filters: Filters, eos: Int[Array, "E"], state: State, logits: Float[Array, "B V"], key: PRNGKeyArray
) -> State:
    """Appends the next token of each row that is not done, behind the `cache.length` tokens in the cache."""
    token = next_token(logits, jax.random.fold_in(key, state.step), filters, state.seen)
    token = jnp.where(state.done, 0, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    text = None if state.text is None else state.text.at[state.cache.length].set(token[0])
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        lengths=state.lengths + (~state.done).astype(jnp.int32),
        step=state.step + 1,
        done=state.done | jnp.any(token[:, None] == eos[None], axis=1),
        seen=seen,
        text=text,
    )


def empty_state(cache: Cache, seen: Bool[Array, "B V"] | None, text: Int[Array, "R"] | None) -> State:
    """Before the first token."""
    B, room = cache.valid.shape
    zero = jnp.zeros((), jnp.int32)
    return State(
        cache=cache,
        tokens=jnp.zeros((B, room), jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        step=zero,
        done=jnp.zeros(B, bool),
        passes=zero,
        seen=seen,
        text=text,
    )


def prefill(
    config: ModelConfig,
    kv_format: str | None,
    keep_text: bool,
    variables: Variables,
    filters: Filters,
    eos: Int[Array, "E"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: PRNGKeyArray,
) -> State:
    """Reads the prompts, `lengths` tokens of each row, and chooses the first token.

    Args:
      keep_text: for prompt look-up; B is 1.
    """
    B, T = tokens.shape
    room = cache_capacity(config, T)
    mask = jnp.arange(T, dtype=jnp.int32)[None] < lengths[:, None]
    cache = init_cache(config, B, room, kv_format)
    logits, cache = forward(config, variables, filters, tokens, cache, mask, read=lengths - 1)
    # Each row continues after its prompt and overwrites the padding.
    cache = dataclasses.replace(cache, length=lengths if B > 1 else lengths[0])
    seen = None
    if filters.repetition_penalty is not None:
        rows = jnp.arange(B)[:, None]
        # max, not set: the padding token may also occur in the prompt.
        seen = jnp.zeros((B, config.vocab_size), bool).at[rows, tokens].max(mask)
    text = jnp.pad(tokens[0], (0, room + 1 - T)) if keep_text else None
    return choose(filters, eos, empty_state(cache, seen, text), logits[:, 0], key)


def with_room(room: int, state: State) -> State:
    more = room - state.tokens.shape[1]
    return dataclasses.replace(
        state,
        cache=extend_cache(state.cache, room),
        tokens=jnp.pad(state.tokens, ((0, 0), (0, more))),
        text=None if state.text is None else jnp.pad(state.text, (0, more)),
    )


def advance(
    config: ModelConfig,
    drafted: int,
    variables: Variables,
    filters: Filters,
    eos: Int[Array, "E"],
    state: State,
    key: PRNGKeyArray,
    until: Int[Array, ""] | int,
) -> State:
    """Generates until there are `until` tokens or every row is done.

    Args:
      drafted: tokens that prompt look-up drafts for a pass, see prompt_lookup.py; 0: none.
    """

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.done)

    def passed(state: State, tokens: Int[Array, "B T"]) -> tuple[State, Float[Array, "B T V"]]:
        logits, cache = forward(config, variables, filters, tokens, state.cache)
        return dataclasses.replace(state, cache=cache, passes=state.passes + 1), logits

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        state, logits = passed(state, last)
        return choose(filters, eos, state, logits[:, 0], key)

    def text_of(state: State) -> Int[Array, "R"]:
        assert state.text is not None  # kept by prefill
        return state.text

    def step_with(draft: Int[Array, "N"], state: State) -> State:
        """Chooses up to 1 + N tokens from one pass: as many as the draft foresaw, and the next one."""
        last = state.cache.length  # the place in the text of the last token
        state, logits = passed(state, jnp.append(text_of(state)[last], draft)[None])

        def foreseen(i: Int[Array, ""], state: State) -> Bool[Array, ""]:
            return (i == 0) | (
                (i <= drafted) & (text_of(state)[last + i] == draft[i - 1]) & unfinished(state)
            )

        def one(i: Int[Array, ""], state: State) -> tuple[Int[Array, ""], State]:
            cache = dataclasses.replace(state.cache, length=last + 1 + i)
            state = dataclasses.replace(state, cache=cache)
            return i + 1, choose(filters, eos, state, logits[:, i], key)

        _, state = jax.lax.while_loop(
            lambda carry: foreseen(*carry), lambda carry: one(*carry), (jnp.zeros((), jnp.int32), state)
        )
        cache = state.cache
        written = jnp.arange(cache.valid.shape[1], dtype=jnp.int32)[None] < cache.length
        return dataclasses.replace(state, cache=dataclasses.replace(cache, valid=cache.valid & written))

    def step_with_lookup(state: State) -> State:
        last = state.cache.length
        draft, found = prompt_lookup.draft(text_of(state), last, drafted)
        fits = last + 1 + drafted <= state.tokens.shape[1]
        return jax.lax.cond(found & fits, partial(step_with, draft), step, state)

    return jax.lax.while_loop(unfinished, step_with_lookup if drafted else step, state)
