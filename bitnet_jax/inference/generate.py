"""Generation: one prefill of the prompt, then one jitted loop over the cache; latent and packed models alike.

    generate        all tokens in one call: the loop never returns to Python
    stream_tokens   the same tokens in chunks, as they come

Both run the same two functions, `_prefill` and `_advance`, and the random key of a token is folded from its
position, so a seed gives the same text either way. The jitted functions live at module level: a second call
with the same shapes, `ModelConfig`, `SamplingConfig` and `eos_ids` compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitnet_jax.inference import exact_head
from bitnet_jax.inference.cache import KV_FORMATS, init_cache
from bitnet_jax.inference.sampling import SamplingConfig, next_token
from bitnet_jax.models.transformer import Cache, Transformer
from bitnet_jax.nn.config import ModelConfig

Variables = Mapping[str, Any]
GREEDY = SamplingConfig()


class Generation(NamedTuple):
    """N is max_new_tokens. Row b holds `lengths[b]` tokens, an end token included; zeros follow."""

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]


@flax.struct.dataclass
class State:
    """Generation after `step` tokens; the last one is chosen but not yet in the cache."""

    cache: Cache
    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    step: Int[Array, ""]
    done: Bool[Array, "B"]  # rows that have met an end token
    seen: Bool[Array, "B V"] | None  # tokens of prompt and text, kept where repetition is penalized


def left_pad(prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of several prompts -> tokens int32 [B, T], mask bool [B, T] (True: a real token).

    Raises:
      ValueError: no prompt, or an empty one.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not min(lengths):
        raise ValueError(f"got prompts of {lengths or 'no'} tokens, expected at least one token in each")
    T = max(lengths)
    tokens = np.zeros((len(prompts), T), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[T - len(prompt) :] = prompt
    return tokens, np.arange(T)[None, :] >= T - np.asarray(lengths)[:, None]


def generate(
    config: ModelConfig,
    variables: Variables,
    tokens: Int[Array | np.ndarray, "B T"],
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    key: PRNGKeyArray | None = None,
    eos_ids: Sequence[int] = (),
    kv_format: str | None = None,
) -> Generation:
    """Continues a batch of prompts.

    Args:
      variables: {"params": ...}, with "packed" beside it for a packed model, and an exact head where
        exact_head.with_exact_head put one.
      tokens, mask: prompts, padded on the left (`left_pad`); no mask: all tokens are real.
      max_new_tokens: N; the loop ends earlier once every row has met an end token.
      key: jax.random.key(seed); needed unless sampling is greedy.
      eos_ids: tokens that end a row.
      kv_format: of the cache, "float32", "bfloat16" or "int8"; None: config.dtype.

    Raises:
      ValueError: before any computation, if prompt and new tokens do not fit into config.max_length, if the
        prompts are empty, not padded on the left or hold ids outside the vocabulary, if a key is missing, if
        sampling needs more logits than an exact head knows, or for an unknown kv_format.
    """
    prompt = _checked(config, variables, tokens, mask, max_new_tokens, sampling, key, kv_format)
    return _generate(config, sampling, max_new_tokens, _ids(eos_ids), kv_format, variables, *prompt)


def greedy(
    config: ModelConfig,
    variables: Variables,
    tokens: Int[Array | np.ndarray, "B T"],
    mask: Bool[Array | np.ndarray, "B T"] | None,
    max_new_tokens: int,
) -> Int[Array, "B N"]:
    """The most likely continuation without end tokens: what `packing.prove` compares."""
    return generate(config, variables, tokens, mask, max_new_tokens=max_new_tokens).tokens


def stream_tokens(
    config: ModelConfig,
    variables: Variables,
    tokens: Int[Array | np.ndarray, "B T"],
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    key: PRNGKeyArray | None = None,
    eos_ids: Sequence[int] = (),
    kv_format: str | None = None,
    chunk: int = 16,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` as arrays [B, <= chunk], the first one (of length 1) right after the prefill.

    The cache is donated from chunk to chunk and so never copied. Arguments and errors: see `generate`; they
    are checked when this is called, not when the first token is asked for.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected at least 1 token")
    prompt = _checked(config, variables, tokens, mask, max_new_tokens, sampling, key, kv_format)
    eos = _ids(eos_ids)

    def chunks() -> Iterator[np.ndarray]:
        state = _start(config, sampling, max_new_tokens, eos, kv_format, variables, *prompt)
        given = 0
        while True:
            step, done = int(state.step), bool(state.done.all())
            # A copy: the buffer itself is donated to the next chunk.
            yield np.array(state.tokens[:, given:step])
            if done or step == max_new_tokens:
                return
            given, until = step, min(step + chunk, max_new_tokens)
            state = _continue(config, sampling, eos, variables, state, prompt[-1], np.int32(until))

    return chunks()


def _checked(
    config: ModelConfig,
    variables: Variables,
    tokens: Array | np.ndarray,
    mask: Array | np.ndarray | None,
    max_new_tokens: int,
    sampling: SamplingConfig,
    key: PRNGKeyArray | None,
    kv_format: str | None,
) -> tuple[np.ndarray, np.ndarray, PRNGKeyArray]:
    """Tokens, mask and key for the jitted functions; everything a user can get wrong is refused here."""
    if not config.causal or config.num_classes:
        raise ValueError(
            "generation needs a causal language model, "
            f"got causal={config.causal}, num_classes={config.num_classes}"
        )
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}, expected integers [B, T], T >= 1")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"tokens lie in [{tokens.min()}, {tokens.max()}], expected ids in [0, {config.vocab_size}): "
            "is the tokenizer the model's own?"
        )
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape or mask.dtype != bool:
        raise ValueError(f"mask is {mask.dtype}{list(mask.shape)}, expected bool{list(tokens.shape)}")
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("mask must be False for padding on the left, then True up to the end of each row")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    longest = int(mask.sum(axis=1).max())
    if longest + max_new_tokens > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones need {longest + max_new_tokens} "
            f"positions, the model has max_length={config.max_length}; "
            "shorten the prompt or ask for fewer tokens"
        )
    if kv_format not in (None, *KV_FORMATS):
        raise ValueError(f"kv_format: got {kv_format!r}, expected None or one of {', '.join(KV_FORMATS)}")
    if key is None:
        if sampling.temperature > 0:
            raise ValueError(f"temperature={sampling.temperature} needs a key; pass jax.random.key(seed)")
        key = jax.random.key(0)
    if exact_head.COLLECTION in variables:
        exact_head.looked_at(sampling)
    return tokens.astype(np.int32), mask, key


def _ids(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)


def _forward(
    config: ModelConfig,
    sampling: SamplingConfig,
    variables: Variables,
    tokens: Array,
    cache: Cache,
    mask: Array | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits behind the last of the tokens [B, T], as far as sampling looks, and the cache that holds them all."""
    model = {name: leaves for name, leaves in variables.items() if name != exact_head.COLLECTION}
    output: Any = Transformer(config).apply(model, tokens, mask=mask, cache=cache, last_only=True)
    head = variables.get(exact_head.COLLECTION)
    if head is None:
        return output.logits[:, -1], output.cache
    return head.top_logits(
        output.hidden[:, -1], sampling
    ).logits, output.cache  # the other logits are never computed


def _choose(
    sampling: SamplingConfig,
    eos: tuple[int, ...],
    state: State,
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
) -> State:
    """Appends the next token of each row that is not done."""
    token = next_token(logits, jax.random.fold_in(key, state.step), sampling, state.seen)
    token = jnp.where(state.done, 0, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    ended = jnp.isin(token, jnp.array(eos, jnp.int32)) if eos else jnp.zeros_like(state.done)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        lengths=state.lengths + (~state.done).astype(jnp.int32),
        step=state.step + 1,
        done=state.done | ended,
        seen=seen,
    )


def _prefill(
    config: ModelConfig,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos: tuple[int, ...],
    kv_format: str | None,
    variables: Variables,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    key: PRNGKeyArray,
) -> State:
    """Reads the prompt and chooses the first token."""
    B, T = tokens.shape
    # The last new token is never read, so the cache needs no room for it.
    cache = init_cache(config, B, T + max_new_tokens - 1, kv_format)
    logits, cache = _forward(config, sampling, variables, tokens, cache, mask)
    seen = None
    if sampling.repetition_penalty != 1:
        rows = jnp.arange(B)[:, None]
        # max, not set: a token may stand at a real place and at a padded one.
        seen = jnp.zeros((B, config.vocab_size), bool).at[rows, tokens].max(mask)
    state = State(
        cache=cache,
        tokens=jnp.zeros((B, max_new_tokens), jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros(B, bool),
        seen=seen,
    )
    return _choose(sampling, eos, state, logits, key)


def _advance(
    config: ModelConfig,
    sampling: SamplingConfig,
    eos: tuple[int, ...],
    variables: Variables,
    state: State,
    key: PRNGKeyArray,
    until: Int[Array, ""] | int,
) -> State:
    """Generates until `until` tokens are there or every row is done."""

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        logits, cache = _forward(config, sampling, variables, last, state.cache)
        return _choose(sampling, eos, dataclasses.replace(state, cache=cache), logits, key)

    return jax.lax.while_loop(unfinished, step, state)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(
    config: ModelConfig,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos: tuple[int, ...],
    kv_format: str | None,
    variables: Variables,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    key: PRNGKeyArray,
) -> Generation:
    state = _prefill(config, sampling, max_new_tokens, eos, kv_format, variables, tokens, mask, key)
    state = _advance(config, sampling, eos, variables, state, key, max_new_tokens)
    return Generation(state.tokens, state.lengths)


_start = jax.jit(_prefill, static_argnums=(0, 1, 2, 3, 4))
_continue = jax.jit(_advance, static_argnums=(0, 1, 2), donate_argnums=(4,))
