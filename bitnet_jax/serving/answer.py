"""One request while it runs: what was chosen, what it means for the next choice, and its text so far."""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np

from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.inference.streaming import StopCutter
from bitnet_jax.serving.requests import Finished, Piece, PromptScores, Request, Sink, TokenScore


class Answer:
    """The handle that `Engine.submit` returns; only `cancel` may be called by other threads than the engine's."""

    def __init__(self, request: Request, sink: Sink, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.request, self.send = request, sink
        self.tokens: list[int] = []
        self.cached = 0  # tokens of the prompt that were in the cache
        self.prompt_scores: list[TokenScore] = []
        self.filters = request.sampling.filters()
        # The data of jax.random.key(seed), whose construction would compile a program.
        self.key = np.array([request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF], np.uint32)
        self._began = time.perf_counter()
        self._first: float | None = None  # when the first token was chosen
        self._cancelled = threading.Event()
        self._decoder, self._cutter = tokenizer.decoder(), StopCutter(request.stop)
        self._decoded = self._released = 0  # characters
        self._held: deque[tuple[int, TokenScore]] = (
            deque()
        )  # scores, with the place in the text of their tokens
        self._bias: np.ndarray | None = None
        self._counts: np.ndarray | None = None
        self.seen: np.ndarray | None = (
            None  # bool [V], tokens of prompt and answer; None without their penalty
        )
        if request.bias:
            self._bias = np.zeros(vocab_size, np.float32)
            for token, addition in request.bias:
                self._bias[token] += addition
        self._progress = request.grammar.start() if request.grammar else None
        self._mask = self._progress.mask(vocab_size) if self._progress else None
        if request.presence_penalty or request.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.float32)
        if request.sampling.repetition_penalty != 1:
            self.seen = np.zeros(vocab_size, bool)
            self.seen[request.prompt] = True

    def cancel(self) -> None:
        """The engine ends the answer before its next pass over it."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def seconds(self) -> float:
        """Since the request."""
        return time.perf_counter() - self._began

    @property
    def added(self) -> np.ndarray | None:
        """float32 [V], what bias, penalties and grammar add to the logits; None if there are none."""
        parts = [part for part in (self._bias, self._penalty, self._mask) if part is not None]
        return np.sum(parts, axis=0).astype(np.float32) if parts else None

    @property
    def _penalty(self) -> np.ndarray | None:
        if self._counts is None:
            return None
        request = self.request
        return -(request.presence_penalty * (self._counts > 0) + request.frequency_penalty * self._counts)

    def push(self, token: int, score: TokenScore | None) -> str | None:
        """Adds the next token and sends what is new; the reason why the answer ends with it, or None."""
        if self._first is None:
            self._first = time.perf_counter()
        self.tokens.append(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True
        ended, complete = token in self.request.end, False
        if self._progress is not None and self._mask is not None:
            complete = self._progress.advance(token)
            if not (ended or complete):
                self._mask = self._progress.mask(len(self._mask))
        if score is not None:
            self._held.append((self._decoded, score))
        if not ended:
            text = self._decoder.push([token])
            self._decoded += len(text)
            self._release(self._cutter.push(text))
        if ended or complete or self._cutter.stopped:
            return "stop"
        return "length" if len(self.tokens) == self.request.max_tokens else None

    def _release(self, text: str) -> None:
        self._released += len(text)
        due = []
        whole = self._released == self._decoded
        while self._held and (self._held[0][0] < self._released or whole):
            due.append(self._held.popleft()[1])
        if text or due:
            self.send(Piece(text, tuple(due)))

    def send_prompt_scores(self) -> None:
        self.send(PromptScores(tuple(self.prompt_scores)))

    def finish(self, reason: str, message: str = "") -> None:
        """Sends the rest of the text and the last event."""
        if reason in ("stop", "length") and not self._cutter.stopped:
            rest = self._decoder.finish()
            self._decoded += len(rest)
            text = self._cutter.push(rest)
            if not self._cutter.stopped:
                text += self._cutter.finish()
            reason = "stop" if self._cutter.stopped else reason
            self._release(text)
        self.send(
            Finished(
                reason,
                prompt_tokens=len(self.request.prompt),
                completion_tokens=len(self.tokens),
                cached_tokens=self.cached,
                first_seconds=None if self._first is None else self._first - self._began,
                seconds=self.seconds,
                message=message,
            )
        )
