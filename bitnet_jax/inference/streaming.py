"""Streaming text: token ids are decoded as soon as characters are complete, and cut at the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import PRNGKeyArray

from bitnet_jax.data.conversation import Conversation, of_documents, prompt_ids
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.inference.generation import GREEDY, Variables, left_pad, stream_tokens
from bitnet_jax.inference.limits import check_tokens, warn_of_unknown_tokens
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig


def stream(
    config: ModelConfig,
    variables: Variables,
    tokenizer: Tokenizer,
    prompt: str | np.ndarray,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    key: PRNGKeyArray | None = None,
    conversation: Conversation | None = None,
    stop: Sequence[str] = (),
    kv_format: str | None = None,
    prompt_lookup: int = 0,
    chunk: int = 16,
    on_tokens: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Continues one prompt; yields pieces of text, never the prompt, an end token or a stop string.

    Args:
      prompt: a text, whose tokens follow the begin tokens of the conversation; or all its tokens, int [T], such as
        those of `chat_template.chat_ids`.
      conversation: its end tokens end the text; None: `conversation.of_documents(tokenizer)`, as for a model trained
        here.
      stop: the text ends before the first of these, wherever the chunk or token boundaries are.
      on_tokens: called with the number of new tokens in each chunk, before their text is yielded.
      Others: see `generation.generate` and `generation.stream_tokens`.

    Raises:
      ValueError: see `generation.generate`; also a prompt with a token outside the model's vocabulary, an empty
        prompt or an empty stop string. Raised by this call, before anything is computed.

    Warns:
      UserWarning: the tokenizer has more tokens than the model; prompt and text exceed the trained length.
    """
    warn_of_unknown_tokens(config, tokenizer)
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop: got {stop!r}, expected a list of non-empty strings")
    if conversation is None:
        conversation = of_documents(tokenizer)
    ids = prompt_ids(tokenizer, conversation, prompt) if isinstance(prompt, str) else np.asarray(prompt)
    if not len(ids):
        given = f" {prompt!r}" if isinstance(prompt, str) else ""
        raise ValueError(f"the prompt{given} has no tokens; begin with at least one, such as a newline")
    check_tokens(config, tokenizer, ids, "prompt")
    tokens, mask = left_pad([ids])
    chunks = stream_tokens(
        config,
        variables,
        tokens,
        mask,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        eos_ids=conversation.end,
        kv_format=kv_format,
        prompt_lookup=prompt_lookup,
        chunk=chunk,
    )

    def rows() -> Iterator[np.ndarray]:
        for (row,) in chunks:
            if on_tokens is not None:
                on_tokens(len(row))
            yield row

    return cut_at_stop(_decoded(rows(), tokenizer, frozenset(conversation.end)), stop)


def _decoded(chunks: Iterator[np.ndarray], tokenizer: Tokenizer, eos_ids: frozenset[int]) -> Iterator[str]:
    decoder = tokenizer.decoder()
    for ids in chunks:
        yield decoder.push([int(token) for token in ids if int(token) not in eos_ids])
    yield decoder.finish()


def cut_at_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The joined text up to the first stop string; a suffix that may become one is held back."""
    cutter = StopCutter(stop)
    for piece in pieces:
        if text := cutter.push(piece):
            yield text
        if cutter.stopped:
            return
    if rest := cutter.finish():
        yield rest


class StopCutter:
    """`cut_at_stop` for pieces that are pushed: what may be shown of them; `stopped` after the first stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        held = self._held + piece
        first, pending = _first_stop(held, self._stop), len(held) - _length_of_possible_stop(held, self._stop)
        if first <= pending:  # otherwise a stop string that begins earlier may still be completed
            self._held, self.stopped = "", first < len(held)
            return held[:first]
        self._held = held[pending:]
        return held[:pending]

    def finish(self) -> str:
        held, self._held = self._held, ""
        first = _first_stop(held, self._stop)
        self.stopped |= first < len(held)
        return held[:first]


def _first_stop(text: str, stop: Sequence[str]) -> int:
    """Index of the first stop string; the length of the text if there is none."""
    return min((place for place in (text.find(s) for s in stop) if place >= 0), default=len(text))


def _length_of_possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    lengths = range(max(map(len, stop), default=1) - 1, 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop) and n <= len(text)), 0)
