"""Continuous batching: many requests share the passes of one model, and each gets the bytes it would get alone.

    engine = Engine(model.config, model.variables, model.tokenizer, slots=4)
    answer = engine.submit(Request(prompt=ids, max_tokens=100), sink)   # from any thread; `sink` gets the events
    engine.run()                                                        # in one thread, until `close`

A step reads one chunk of one prompt, the prompts taking turns, and decodes one token of every answer; so a long prompt
delays an answer by one chunk a token, and a request that is cancelled ends within one. Requests wait in a fair queue
for one of the slots, each a row of the cache.

Where rows are exact (`passes.rows_are_exact`), all answers decode in one pass. For other models, whose sums XLA may
order by the shape of a pass, each slot has its own cache and passes, and prompts are cut at the same places whatever
is in the cache. Either way an answer depends on its request alone. Prompt look-up (inference/prompt_lookup.py) drafts
tokens where one answer decodes alone: together, the passes of several cost less for each.

The prefix cache is the slots themselves (slots.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.inference.cache import default_kv_format
from bitnet_jax.inference.limits import check_tokens, warn_of_unknown_tokens
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.inference.steps import Variables
from bitnet_jax.models import ModelConfig
from bitnet_jax.names import check_name
from bitnet_jax.serving.answer import Answer
from bitnet_jax.serving.fair_queue import FairQueue
from bitnet_jax.serving.grammar import GrammarError
from bitnet_jax.serving.passes import rows_are_exact
from bitnet_jax.serving.pool import Pool, choose, draft_tokens, row_of, score
from bitnet_jax.serving.requests import Closed, QueueFull, Request, Sink, TokenScore, TooLong
from bitnet_jax.serving.slots import Slot, Slots

CHUNK = 128  # tokens of a prompt that a step reads; a power of two


@dataclasses.dataclass
class Counters:
    """Since the engine was made."""

    requests: int = 0
    refused: int = 0  # for a full queue
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0
    prompt_tokens: int = 0  # read, or found in the cache
    cached_tokens: int = 0  # found in the cache
    prefix_hits: int = 0  # requests that found any
    generated_tokens: int = 0
    passes: int = 0  # chunks read, and decode passes


class Engine:
    """See the module docstring.

    Args:
      slots: requests that run at once.
      context: most tokens of a prompt and its answer; None: the length that the model was trained with.
      kv_format: see `generation.generate`.
      queue_limit: requests that may wait for a slot.
      chunk: see CHUNK.
      prompt_lookup: tokens to draft for a pass, fewer than a chunk; 0: none. Only where rows are exact, since elsewhere
        a draft may change an answer.
      timeout: seconds from a request to the end of its answer, after which it is given up; None: no limit.
      adapters: name -> variables of the model with this adapter, which requests choose by name. Their arrays have the
        same shapes, so that all are served by one program. Answers of different adapters decode in turn.

    Raises:
      ValueError: not a causal language model with a cache of keys, or a setting out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: Variables,
        tokenizer: Tokenizer,
        *,
        slots: int = 4,
        context: int | None = None,
        kv_format: str | None = None,
        queue_limit: int = 256,
        chunk: int = CHUNK,
        prompt_lookup: int = 0,
        timeout: float | None = None,
        adapters: Mapping[str, Variables] | None = None,
    ) -> None:
        if config.attention == "linear":
            raise ValueError(
                "got a model with linear attention, expected a cache of keys; use bitnet-jax generate"
            )
        for name, value, least in (
            ("slots", slots, 1), ("queue_limit", queue_limit, 1), ("prompt_lookup", prompt_lookup, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: got {timeout:g}, expected more than 0 seconds")
        self.context = config.known_length if context is None else context
        if not 2 <= self.context <= config.max_length:
            raise ValueError(
                f"context: got {context}, expected 2 to {config.max_length}, the model's max_length"
            )
        warn_of_unknown_tokens(config, tokenizer)
        self.config, self.tokenizer, self.counters = config, tokenizer, Counters()
        self.exact = rows_are_exact(config, variables)
        if prompt_lookup and not self.exact:
            raise ValueError(
                f"prompt_lookup: got {prompt_lookup} for a model whose sums depend on the shape of a pass, expected 0; "
                "pack the model"
            )
        if prompt_lookup >= chunk:
            raise ValueError(f"prompt_lookup: got {prompt_lookup}, expected fewer than {chunk}")
        self._drafted = prompt_lookup
        self._chunk, self._queue_limit, self.timeout = chunk, queue_limit, timeout
        kv_format = kv_format or default_kv_format(config, variables)
        # Padding of a last chunk, and what inactive rows write, lies behind the context.
        every: dict[str | None, Variables] = {None: variables}
        every.update(adapters or {})
        self.adapters = tuple(adapters or ())
        sizes = (config, every, slots if self.exact else 1, self.context + chunk, kv_format)
        self._pools = [Pool(*sizes) for _ in range(1 if self.exact else slots)]
        self._slots = Slots(self._pools, self.exact, chunk)
        self._queue: FairQueue[Answer] = FairQueue()
        self._wake = threading.Condition()
        self._closed = False

    def submit(self, request: Request, sink: Sink) -> Answer:
        """Queues a request; `sink` is called with its events by the thread that steps.

        Raises:
          ValueError: an empty prompt, or a token outside the vocabulary.
          TooLong (a ValueError), QueueFull, Closed: see there.
        """
        length = len(request.prompt)
        if not length:
            raise ValueError("the prompt has no tokens; begin with at least one, such as a newline")
        if (lowest := int(request.prompt.min())) < 0:
            raise ValueError(f"prompt: got the token {lowest}, expected ids from 0")
        if request.adapter is not None:
            check_name("adapter", request.adapter, self.adapters)
        check_tokens(self.config, self.tokenizer, request.prompt, "prompt")
        if length + request.max_tokens > self.context:
            raise TooLong(
                f"a prompt of {length} tokens and {request.max_tokens} new ones need {length + request.max_tokens} "
                f"positions, expected at most {self.context}; shorten the prompt or request fewer tokens"
            )
        if outside := [token for token, _ in request.bias if not 0 <= token < self.config.vocab_size]:
            raise ValueError(f"bias: got the token {outside[0]}, expected 0 to {self.config.vocab_size - 1}")
        answer = Answer(request, sink, self.tokenizer, self.config.vocab_size)
        with self._wake:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._queue) >= self._queue_limit:
                self.counters.refused += 1
                raise QueueFull(f"{self._queue_limit} requests wait; try again later")
            self.counters.requests += 1
            self._queue.push(request.client, answer)
            self._wake.notify()
        return answer

    def warm(self) -> threading.Thread:
        """Compiles what the first ordinary request needs, and in the thread that it returns what others need."""
        compiling = self._pools[0].compile(self._chunk)
        logits = np.zeros((1, self.config.vocab_size), np.float32)
        for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0)):
            choose(sampling.filters(), logits, np.zeros(2, np.uint32), 0)
        return compiling

    @property
    def running(self) -> int:
        return self._slots.running

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def slots(self) -> int:
        return len(self._slots)

    def describe_slots(self) -> list[dict[str, Any]]:
        """What each slot does; read from another thread, so the numbers may be of different steps."""
        return [slot.describe() for slot in self._slots]

    def run(self) -> None:
        """Steps while there is work and waits where there is none, until `close`."""
        while True:
            if self.step():
                continue
            with self._wake:
                if self._closed and not self.waiting and not self.running:
                    return
                if not self.waiting:
                    self._wake.wait()

    def close(self, grace: float = 0.0) -> None:
        """Refuses new requests; those at work have `grace` seconds to finish, then they are cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        until = time.monotonic() + grace
        while (self.running or self.waiting) and time.monotonic() < until:
            time.sleep(0.02)
        with self._wake:
            for answer in [*self._queue, *(slot.answer for slot in self._slots)]:
                if answer is not None:
                    answer.cancel()
            self._wake.notify()

    def step(self) -> bool:
        """Reads one chunk of a prompt and decodes one token of every answer; False: there was nothing to do."""
        self._drop()
        try:
            self._admit()
            read = self._read_chunk()
            decoded = [self._decode(pool) for pool in self._pools]
        except Exception as error:  # the caches may be gone: they were donated
            self._fail(error)
            return True
        return read or any(decoded)

    def _drop(self) -> None:
        """Ends what was cancelled or takes too long."""

        def reason(answer: Answer) -> str | None:
            if answer.cancelled:
                return "cancelled"
            return "timeout" if self.timeout is not None and answer.seconds > self.timeout else None

        with self._wake:
            dropped = self._queue.remove(lambda answer: reason(answer) is not None)
        for slot in self._slots:
            if slot.answer is not None and reason(slot.answer) is not None:
                dropped.append(slot.answer)
                slot.answer = None
        for answer in dropped:
            if answer.cancelled:
                self.counters.cancelled += 1
                answer.finish("cancelled")
            else:
                self.counters.timed_out += 1
                answer.finish("timeout", f"it took longer than {self.timeout:g} s")

    def _admit(self) -> None:
        while self.running < len(self._slots):
            with self._wake:
                if not len(self._queue):
                    return
                answer = self._queue.pop()
            self._slots.place(answer)
            self.counters.prompt_tokens += len(answer.request.prompt)

    def _read_chunk(self) -> bool:
        """The next chunk of the prompt whose turn it is."""
        slot = self._slots.next_to_read()
        if slot is None or slot.answer is None:
            return False
        answer, start = slot.answer, len(slot.tokens)
        request = answer.request
        tokens = request.prompt[start : start + self._chunk]
        every = request.score_prompt
        logits = slot.pool.read_tokens(slot.row, tokens, start, self._chunk, every, slot.adapter)
        self.counters.passes += 1
        slot.tokens += tokens.tolist()
        if len(tokens) == self._chunk and slot.chunked == start and not request.score_prompt:
            slot.chunked += self._chunk  # a pass that scores is another program
        if request.score_prompt:
            if not start:
                answer.prompt_scores.append(TokenScore(int(tokens[0]), None, ()))
            following = request.prompt[start + 1 : start + 1 + len(tokens)]
            answer.prompt_scores += _scored(logits, following)
        if slot.reads:
            return True
        self.counters.cached_tokens += answer.cached
        self.counters.prefix_hits += answer.cached > 0
        if request.score_prompt:
            answer.send_prompt_scores()
        if request.max_tokens:
            self._choose(slot, row_of(logits, len(tokens) - 1 if request.score_prompt else 0))
        else:
            self._end(slot, "length")
        return True

    def _decode(self, pool: Pool) -> bool:
        """One token of every answer in a pool whose prompt has been read."""
        slots = [slot for slot in self._slots if slot.pool is pool and slot.decodes]
        if not slots:
            return False
        if self._drafted and len(slots) == 1 and self._decode_drafted(slots[0]):
            return True
        for adapter, alike in itertools.groupby(sorted(slots, key=_adapter_name), key=_adapter_name):
            self._decode_together(pool, list(alike), adapter or None)
        return True

    def _decode_together(self, pool: Pool, slots: list[Slot], adapter: str | None) -> None:
        tokens = [slot.answer.tokens[-1] for slot in slots if slot.answer is not None]
        lengths = [len(slot.tokens) for slot in slots]
        logits = pool.decode([slot.row for slot in slots], tokens, lengths, adapter)
        self.counters.passes += 1
        for i, slot in enumerate(slots):
            slot.tokens.append(tokens[i])
            self._choose(slot, row_of(logits, i))

    def _decode_drafted(self, slot: Slot) -> bool:
        """As many tokens of an answer as a draft foresees, and the next one, in one pass; False: there is no draft."""
        answer, start = slot.answer, len(slot.tokens)
        assert answer is not None
        text = np.zeros(self.context + 1, np.int32)
        text[: start + 1] = [*slot.tokens, answer.tokens[-1]]
        draft = draft_tokens(text, start, self._drafted)
        if draft is None:
            return False
        tokens = np.array([answer.tokens[-1], *draft], np.int32)
        logits = slot.pool.read_tokens(slot.row, tokens, start, len(tokens), True, slot.adapter)
        self.counters.passes += 1
        for i, token in enumerate(tokens):
            if i and (slot.answer is None or answer.tokens[-1] != token):
                break
            slot.tokens.append(int(token))
            self._choose(slot, row_of(logits, i))
        return True

    def _choose(self, slot: Slot, logits: Any) -> None:
        """The next token of an answer, from logits [1, V]."""
        answer = slot.answer
        assert answer is not None
        step = len(answer.tokens)
        token = choose(answer.filters, logits, answer.key, step, answer.added, answer.seen)
        scored = None
        if answer.request.scores:
            (scored,) = _scored(logits, np.array([token], np.int32))
        self.counters.generated_tokens += 1
        try:
            reason = answer.push(token, scored)
        except GrammarError as error:
            self.counters.failed += 1
            self._end(slot, "grammar", str(error))
            return
        except Exception as error:  # such as a token that the tokenizer lacks: it concerns no other answer
            self.counters.failed += 1
            self._end(slot, "error", f"{type(error).__name__}: {error}")
            return
        if reason:
            self._end(slot, reason)

    def _end(self, slot: Slot, reason: str, message: str = "") -> None:
        answer, slot.answer = slot.answer, None
        assert answer is not None
        answer.finish(reason, message)

    def _fail(self, error: Exception) -> None:
        """Ends all answers at work, and begins anew with empty caches."""
        for slot in self._slots:
            if slot.answer is not None:
                self.counters.failed += 1
                self._end(slot, "error", f"{type(error).__name__}: {error}")
            slot.tokens, slot.chunked = [], 0
        for pool in self._pools:
            pool.clear()


def _adapter_name(slot: Slot) -> str:
    return slot.adapter or ""


def _scored(logits: Any, tokens: np.ndarray) -> list[TokenScore]:
    if not len(tokens):
        return []
    found = score(logits, tokens)
    rows = zip(tokens.tolist(), *(x.tolist() for x in found), strict=True)
    return [TokenScore(token, ln, tuple(zip(ids, top, strict=True))) for token, ln, ids, top in rows]
