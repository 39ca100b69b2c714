"""Generation for latent and packed models: a prefill of the prompt, then one jitted decode loop over the cache.

    generate        all tokens in one call: the loop never returns to Python
    stream_tokens   the same tokens in chunks, as they are generated

Both run the same two functions, `_prefill` and `_advance`, and fold the position of a token into its random key, so a
seed gives the same text either way.

Prompts start at position 0 of the cache and are padded on the right to one of a few widths (buckets.py); generated
tokens overwrite the padding, which is always masked. One compiled loop serves all lengths with the same cache room.
The products of packed layers are exact, and attention and RMSNorm on CPU sum in a fixed order, so they do not depend on
the other rows of a batch; sums that XLA compiles (LayerNorm, float layers) may round differently for another batch
size. Programs are cached in programs.py: per ModelConfig and batch size, one for each prompt width and one for each
cache room, independent of lengths, end tokens and sampling parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitnet_jax.inference import exact_head, limits
from bitnet_jax.inference.buckets import cache_capacity, prompt_width
from bitnet_jax.inference.cache import KV_FORMATS, default_kv_format, extend_cache, init_cache
from bitnet_jax.inference.programs import PROGRAMS, Program
from bitnet_jax.inference.sampling import Filters, SamplingConfig, next_token
from bitnet_jax.models import ModelConfig
from bitnet_jax.models.transformer import Cache, Transformer

Variables = Mapping[str, Any]
GREEDY = SamplingConfig()


class Generation(NamedTuple):
    """N is max_new_tokens. Row b holds `lengths[b]` tokens, including an end token, then zeros."""

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]


@flax.struct.dataclass
class State:
    """Generation after `step` tokens; the last one is chosen but not yet in the cache."""

    cache: Cache
    tokens: Int[Array, "B S"]  # S is the room of the cache
    lengths: Int[Array, "B"]
    step: Int[Array, ""]
    done: Bool[Array, "B"]  # rows that have reached an end token
    seen: Bool[Array, "B V"] | None  # tokens of prompt and text; None without a repetition penalty


def left_pad(prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of several prompts -> tokens int32 [B, T], mask bool [B, T] (True: a real token).

    Raises:
      ValueError: no prompts, or an empty one.
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
      variables: {"params": ...}, plus "packed" for a packed model, and optionally the exact head added by
        exact_head.with_exact_head.
      tokens, mask: prompts, padded on the left (`left_pad`); no mask: all tokens are real.
      max_new_tokens: N; the loop ends earlier once every row has reached an end token.
      key: jax.random.key(seed); needed unless sampling is greedy.
      eos_ids: tokens that end a row.
      kv_format: of the cache, "float32", "bfloat16" or "int8"; None: bfloat16 for a packed model, else config.dtype.

    Raises:
      ValueError: before any computation, if prompt and new tokens do not fit into config.max_length, if the
        prompts are empty, not padded on the left or contain ids outside the vocabulary, if a key is missing, if
        sampling needs more logits than an exact head computes, or for an unknown kv_format.

    Warns:
      UserWarning: prompt and new tokens exceed the length the model was trained with.
    """
    run = _checked(config, variables, tokens, mask, max_new_tokens, sampling, key, eos_ids, kv_format)
    run.warn_beyond_training()
    return run.finished()


def greedy(
    config: ModelConfig,
    variables: Variables,
    tokens: Int[Array | np.ndarray, "B T"],
    mask: Bool[Array | np.ndarray, "B T"] | None,
    max_new_tokens: int,
) -> Int[Array, "B N"]:
    """The greedy continuation without end tokens, of any length, with a cache in config.dtype: for `prove`."""
    run = _checked(config, variables, tokens, mask, max_new_tokens, GREEDY, None, (), config.dtype)
    return run.finished().tokens


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
    are checked when this is called, not when the first token is requested.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected at least 1 token")
    run = _checked(config, variables, tokens, mask, max_new_tokens, sampling, key, eos_ids, kv_format)
    run.warn_beyond_training()

    def chunks() -> Iterator[np.ndarray]:
        state = run.start()
        emitted = 0
        while True:
            step = int(state.step)
            # A copy: the buffer itself is donated to the next chunk.
            yield np.asarray(state.tokens)[:, emitted:step].copy()
            if step == max_new_tokens or np.asarray(state.done).all():
                return
            if emitted == 0:
                state = run.grown(state)
            emitted = step
            state = run.advance(state, min(step + chunk, max_new_tokens))

    return chunks()


@dataclasses.dataclass(frozen=True)
class _Run:
    """A validated request as arguments of the jitted functions."""

    config: ModelConfig
    variables: Variables
    tokens: np.ndarray  # int32 [B, T], padded on the right; T is a prompt_width
    lengths: np.ndarray  # int32 [B], of the prompts
    filters: Filters
    key: PRNGKeyArray
    eos: np.ndarray  # int32 [E]
    kv_format: str
    room: int  # positions for prompt and text; a cache_capacity
    max_new_tokens: int

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What determines the compiled program besides width and room."""
        exact = exact_head.COLLECTION in self.variables, "packed" in self.variables
        return len(self.tokens), len(self.eos), jax.tree.structure(self.filters), exact

    def warn_beyond_training(self) -> None:
        length = int(self.lengths.max()) + self.max_new_tokens
        remedy = f"keep prompt and new tokens within {self.config.known_length}"
        limits.warn_beyond_training(self.config, length, remedy, stacklevel=3)

    def finished(self) -> Generation:
        state = self.start()
        if self.max_new_tokens > 1:
            state = self.advance(self.grown(state), self.max_new_tokens)
        # Sliced on the host: on the device, or with jnp.asarray, every length would compile a program.
        tokens = np.asarray(state.tokens)[:, : self.max_new_tokens].copy()
        return Generation(jax.device_put(tokens), state.lengths)

    def start(self) -> State:
        T = self.tokens.shape[1]
        program = PROGRAMS.of(_prefill, self.config, self.kv_format, shapes=(T, *self.shapes))
        args = (self.variables, self.filters, self.eos, self.tokens, self.lengths, self.key)
        if self.max_new_tokens > 1 and not program.known and not self._decode().known:
            # The decode loop is compiled beside the prompt's program and while that runs: an answer pauses once.
            lowered = program.lower(*args)
            self._decode().compile_in_background(
                self.variables, self.filters, self.eos, self._state(), self.key, np.int32(0)
            )
            lowered.compile()
        return program(*args)

    def _state(self) -> State:
        """The state between the decode loop's chunks, as shapes."""
        B = len(self.tokens)

        def state() -> State:
            penalized = self.filters.repetition_penalty is not None
            cache = init_cache(self.config, B, self.room, self.kv_format)
            return State(
                cache=dataclasses.replace(cache, length=jnp.zeros(B if B > 1 else (), jnp.int32)),
                tokens=jnp.zeros((B, self.room), jnp.int32),
                lengths=jnp.zeros(B, jnp.int32),
                step=jnp.zeros((), jnp.int32),
                done=jnp.zeros(B, bool),
                seen=jnp.zeros((B, self.config.vocab_size), bool) if penalized else None,
            )

        return jax.eval_shape(state)

    def grown(self, state: State) -> State:
        """The state with room for the whole text; prefill allocates room for the prompt only."""
        room = state.tokens.shape[1]
        if room == self.room:
            return state
        program = PROGRAMS.of(_with_room, self.room, shapes=(self.config, self.kv_format, room, self.shapes))
        return program(state)

    def _decode(self) -> Program:
        shapes = (self.room, self.kv_format, *self.shapes)
        return PROGRAMS.of(_advance, self.config, shapes=shapes, donate=(3,))

    def advance(self, state: State, until: int) -> State:
        return self._decode()(self.variables, self.filters, self.eos, state, self.key, np.int32(until))


def _checked(
    config: ModelConfig,
    variables: Variables,
    tokens: Array | np.ndarray,
    mask: Array | np.ndarray | None,
    max_new_tokens: int,
    sampling: SamplingConfig,
    key: PRNGKeyArray | None,
    eos_ids: Sequence[int],
    kv_format: str | None,
) -> _Run:
    """Validates a request; all user errors are raised here."""
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
            "does the tokenizer belong to the model?"
        )
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape or mask.dtype != bool:
        raise ValueError(f"mask is {mask.dtype}{list(mask.shape)}, expected bool{list(tokens.shape)}")
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("mask must be False for padding on the left, then True up to the end of each row")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    lengths = mask.sum(axis=1, dtype=np.int32)
    longest = int(lengths.max())
    if longest + max_new_tokens > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones need {longest + max_new_tokens} "
            f"positions, the model has max_length={config.max_length}; "
            "shorten the prompt or request fewer tokens"
        )
    if kv_format not in (None, *KV_FORMATS):
        raise ValueError(f"kv_format: got {kv_format!r}, expected None or one of {', '.join(KV_FORMATS)}")
    if key is None:
        if sampling.temperature > 0:
            raise ValueError(f"temperature={sampling.temperature} needs a key; pass jax.random.key(seed)")
        # Never used. jax.random.key would compile a program.
        key = jax.random.wrap_key_data(jax.device_put(np.zeros(2, np.uint32)), impl="threefry2x32")
    if exact_head.COLLECTION in variables:
        exact_head.logits_needed(sampling)
    rows = np.zeros((len(tokens), prompt_width(config, longest)), np.int32)
    for row, prompt, length in zip(rows, tokens, lengths, strict=True):
        row[:length] = prompt[len(prompt) - length :]
    # The last new token is never read, so the cache needs no room for it.
    room = cache_capacity(config, longest + max_new_tokens - 1)
    return _Run(
        config,
        variables,
        rows,
        lengths,
        sampling.filters(),
        key,
        _ids(eos_ids),
        kv_format or default_kv_format(config, variables),
        room,
        max_new_tokens,
    )


def _ids(tokens: Sequence[int]) -> np.ndarray:
    """int32, padded with -1 (not a token) to a multiple of 8, so that few sizes are compiled."""
    ids = np.asarray(tokens, np.int32).reshape(-1)
    return np.pad(ids, (0, -len(ids) % 8), constant_values=-1)


def _forward(
    config: ModelConfig,
    variables: Variables,
    filters: Filters,
    tokens: Array,
    cache: Cache,
    mask: Array | None = None,
    read: Array | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Next-token logits at one position of each row, and the cache with all tokens [B, T] appended.

    Args:
      read: the position, [B]; None: T is 1.
    """
    model = {name: leaves for name, leaves in variables.items() if name != exact_head.COLLECTION}
    output: Any = Transformer(config).apply(model, tokens, mask=mask, cache=cache, read=read)
    head = variables.get(exact_head.COLLECTION)
    if head is None:
        return output.logits[:, 0], output.cache
    k = 1 if filters.temperature is None else filters.top_k
    return head.top_logits(
        output.hidden[:, 0], k
    ).logits, output.cache  # output.logits is unused, so never computed


def _choose(
    filters: Filters, eos: Int[Array, "E"], state: State, logits: Float[Array, "B V"], key: PRNGKeyArray
) -> State:
    """Appends the next token of each row that is not done."""
    token = next_token(logits, jax.random.fold_in(key, state.step), filters, state.seen)
    token = jnp.where(state.done, 0, token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        lengths=state.lengths + (~state.done).astype(jnp.int32),
        step=state.step + 1,
        done=state.done | jnp.any(token[:, None] == eos[None], axis=1),
        seen=seen,
    )


def _prefill(
    config: ModelConfig,
    kv_format: str | None,
    variables: Variables,
    filters: Filters,
    eos: Int[Array, "E"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: PRNGKeyArray,
) -> State:
    """Reads the prompts, `lengths` tokens of each row, and chooses the first token."""
    B, T = tokens.shape
    room = cache_capacity(config, T)
    mask = jnp.arange(T, dtype=jnp.int32)[None] < lengths[:, None]
    cache = init_cache(config, B, room, kv_format)
    logits, cache = _forward(config, variables, filters, tokens, cache, mask, read=lengths - 1)
    # Each row continues after its prompt and overwrites the padding.
    cache = dataclasses.replace(cache, length=lengths if B > 1 else lengths[0])
    seen = None
    if filters.repetition_penalty is not None:
        rows = jnp.arange(B)[:, None]
        # max, not set: the padding token may also occur in the prompt.
        seen = jnp.zeros((B, config.vocab_size), bool).at[rows, tokens].max(mask)
    state = State(
        cache=cache,
        tokens=jnp.zeros((B, room), jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros(B, bool),
        seen=seen,
    )
    return _choose(filters, eos, state, logits, key)


def _with_room(room: int, state: State) -> State:
    tokens = jnp.pad(state.tokens, ((0, 0), (0, room - state.tokens.shape[1])))
    return dataclasses.replace(state, cache=extend_cache(state.cache, room), tokens=tokens)


def _advance(
    config: ModelConfig,
    variables: Variables,
    filters: Filters,
    eos: Int[Array, "E"],
    state: State,
    key: PRNGKeyArray,
    until: Int[Array, ""] | int,
) -> State:
    """Generates until there are `until` tokens or every row is done."""

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        logits, cache = _forward(config, variables, filters, last, state.cache)
        return _choose(filters, eos, dataclasses.replace(state, cache=cache), logits, key)

    return jax.lax.while_loop(unfinished, step, state)
