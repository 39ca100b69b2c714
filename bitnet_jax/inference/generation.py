"""Generation for latent and packed models: a prefill of the prompt, then one jitted decode loop over the cache.

    generate        all tokens in one call: the loop never returns to Python
    stream_tokens   the same tokens in chunks, as they are generated

Both run the same two functions, `prefill` and `advance` of steps.py, so a seed gives the same text either way.

Prompts start at position 0 of the cache and are padded on the right to one of a few widths (buckets.py); generated
tokens overwrite the padding, which is always masked. One compiled loop serves all lengths with the same cache room.
The products of packed layers are exact, and attention and RMSNorm on CPU sum in a fixed order, so they do not depend on
the other rows of a batch; sums that XLA compiles (LayerNorm, float layers) may round differently for another batch
size. Programs are cached in programs.py: per ModelConfig and batch size, one for each prompt width and one for each
cache room, independent of lengths, end tokens and sampling parameters. With prompt look-up (prompt_lookup.py) the loop
checks several drafted tokens in one pass.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from bitnet_jax.inference import exact_head, limits, steps
from bitnet_jax.inference.buckets import cache_capacity, prompt_width
from bitnet_jax.inference.cache import KV_FORMATS, default_kv_format, init_cache
from bitnet_jax.inference.programs import PROGRAMS, Program
from bitnet_jax.inference.sampling import Filters, SamplingConfig
from bitnet_jax.inference.steps import State, Variables
from bitnet_jax.models import ModelConfig

GREEDY = SamplingConfig()


class Generation(NamedTuple):
    """N is max_new_tokens. Row b holds `lengths[b]` tokens, including an end token, then zeros."""

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    passes: int  # through the model after the prompt: the largest length - 1, or fewer with prompt look-up


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
    prompt_lookup: int = 0,
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
      prompt_lookup: tokens to draft from the prompt and the text for each pass (prompt_lookup.py), for one prompt; 0:
        none. Faster where a text repeats parts of its prompt, slower where drafts are often wrong. The tokens are those
        without it, for packed models on CPU; elsewhere a pass over several tokens may round floats differently.

    Raises:
      ValueError: before any computation, if prompt and new tokens do not fit into config.max_length, if the
        prompts are empty, not padded on the left or contain ids outside the vocabulary, if a key is missing, if
        sampling needs more logits than an exact head computes, for an unknown kv_format, or for prompt_lookup with
        several prompts or linear attention.

    Warns:
      UserWarning: prompt and new tokens exceed the length the model was trained with.
    """
    run = _checked(
        config, variables, tokens, mask, max_new_tokens, sampling, key, eos_ids, kv_format, prompt_lookup
    )
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
    run = _checked(config, variables, tokens, mask, max_new_tokens, GREEDY, None, (), config.dtype, 0)
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
    prompt_lookup: int = 0,
    chunk: int = 16,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` as arrays [B, <= chunk], the first one (of length 1) right after the prefill.

    The cache is donated from chunk to chunk and so never copied. Arguments and errors: see `generate`; they
    are checked when this is called, not when the first token is requested.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected at least 1 token")
    run = _checked(
        config, variables, tokens, mask, max_new_tokens, sampling, key, eos_ids, kv_format, prompt_lookup
    )
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
    drafted: int  # tokens a pass, by prompt look-up

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What determines the compiled program besides width and room."""
        exact = exact_head.COLLECTION in self.variables, "packed" in self.variables
        return len(self.tokens), len(self.eos), jax.tree.structure(self.filters), exact, self.drafted

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
        return Generation(jax.device_put(tokens), state.lengths, int(state.passes))

    def start(self) -> State:
        T = self.tokens.shape[1]
        static = (self.config, self.kv_format, self.drafted > 0)
        program = PROGRAMS.of(steps.prefill, *static, shapes=(T, *self.shapes))
        args = (self.variables, self.filters, self.eos, self.tokens, self.lengths, self.key)
        if self.max_new_tokens > 1 and not program.known and not self._decode().known:
            # The decode loop is compiled beside the prompt's program, or while that runs: an answer pauses once.
            lowered, running = program.lower(*args), threading.Event()
            state = self._state()
            self._decode().compile_in_background(
                self.variables, self.filters, self.eos, state, self.key, np.int32(0), after=running
            )
            try:
                lowered.compile()
                return program(*args)
            finally:
                running.set()
        return program(*args)

    def _state(self) -> State:
        """The state between the decode loop's chunks, as shapes."""
        B, room = len(self.tokens), self.room

        def state() -> State:
            cache = init_cache(self.config, B, room, self.kv_format)
            cache = dataclasses.replace(cache, length=jnp.zeros(B if B > 1 else (), jnp.int32))
            penalized = self.filters.repetition_penalty is not None
            seen = jnp.zeros((B, self.config.vocab_size), bool) if penalized else None
            return steps.empty_state(cache, seen, jnp.zeros(room + 1, jnp.int32) if self.drafted else None)

        return jax.eval_shape(state)

    def grown(self, state: State) -> State:
        """The state with room for the whole text; prefill allocates room for the prompt only."""
        room = state.tokens.shape[1]
        if room == self.room:
            return state
        program = PROGRAMS.of(
            steps.with_room, self.room, shapes=(self.config, self.kv_format, room, self.shapes)
        )
        return program(state)

    def _decode(self) -> Program:
        shapes = (self.room, self.kv_format, *self.shapes)
        return PROGRAMS.of(steps.advance, self.config, self.drafted, shapes=shapes, donate=(3,))

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
    prompt_lookup: int,
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
    if not isinstance(prompt_lookup, int) or prompt_lookup < 0:
        raise ValueError(
            f"prompt_lookup: got {prompt_lookup!r}, expected the number of tokens to draft, or 0"
        )
    if prompt_lookup and len(tokens) > 1:
        raise ValueError(
            f"got prompt_lookup={prompt_lookup} for {len(tokens)} prompts, expected one: rows accept different "
            "numbers of drafted tokens"
        )
    if prompt_lookup and config.attention == "linear":
        raise ValueError(
            f"got prompt_lookup={prompt_lookup} for linear attention, expected 0: its state cannot be reset to before "
            "a rejected token"
        )
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
        prompt_lookup,
    )


def _ids(tokens: Sequence[int]) -> np.ndarray:
    """int32, padded with -1 (not a token) to a multiple of 8, so that few sizes are compiled."""
    ids = np.asarray(tokens, np.int32).reshape(-1)
    return np.pad(ids, (0, -len(ids) % 8), constant_values=-1)
