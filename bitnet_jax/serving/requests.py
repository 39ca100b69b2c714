"""What the engine is asked, and what it answers: a request, and the events that it sends to whoever asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.serving.grammar import Grammar


class QueueFull(RuntimeError):
    """As many requests wait as may; ask again later."""


class TooLong(ValueError):
    """A prompt and its answer need more positions than the context has."""


class Closed(RuntimeError):
    """The engine is shutting down."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue. The answer is determined by these fields and the model, whatever else the engine does."""

    prompt: np.ndarray  # int [T], T >= 1
    max_tokens: int  # 0 only scores the prompt
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0  # that of `generate`; at least 0
    end: tuple[int, ...] = ()  # tokens that end the answer
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    bias: tuple[tuple[int, float], ...] = ()  # (token, addition to its logit)
    presence_penalty: float = 0.0  # subtracted from the logit of a token of the answer so far
    frequency_penalty: float = 0.0  # ... for every time that it occurs there
    grammar: Grammar | None = None  # that the answer follows; it ends when nothing more may follow
    scores: bool = False  # of the tokens of the answer
    score_prompt: bool = False  # of the tokens of the prompt
    adapter: str | None = None  # of the engine's, by its name; None: the model alone
    client: str = ""  # clients take turns in the queue


class TokenScore(NamedTuple):
    token: int
    log_probability: float | None  # None: the first token of a prompt
    top: tuple[tuple[int, float], ...]  # the most likely tokens, best first


class Piece(NamedTuple):
    """New text of the answer, and the scores of tokens whose text is now complete or begun (if asked for)."""

    text: str
    scores: tuple[TokenScore, ...] = ()


class PromptScores(NamedTuple):
    """Sent once, before any piece."""

    scores: tuple[TokenScore, ...]


class Finished(NamedTuple):
    """The last event."""

    # "stop": an end token, stop string or complete grammar; "length". Not all of it came: "cancelled"; "timeout";
    # "grammar": it cannot go on within its grammar; "error": of the engine.
    reason: str
    prompt_tokens: int
    completion_tokens: int  # an end token included
    cached_tokens: int  # of the prompt, that were in the cache before
    first_seconds: float | None  # from the request to its first token
    seconds: float  # from the request to this event
    message: str = ""  # of a grammar, timeout or error


Event = Piece | PromptScores | Finished
Sink = Callable[[Event], None]  # called by the engine's thread; must not block
