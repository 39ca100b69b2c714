"""Summaries of texts by a language model: by its chat template, or continuing the text after a cue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bitnet_jax.data.chat_template import chat_ids
from bitnet_jax.data.conversation import with_begin
from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.completion import complete
from bitnet_jax.evaluation.likelihood import TextModel

CUE = "\n\nTL;DR:"  # prompts a language model to summarize (Radford et al. 2019)
INSTRUCTION = "Summarize the following text in one sentence."


class Summaries(NamedTuple):
    texts: list[str]
    cut: dict[int, int]  # number of a text that left no room -> its tokens that were read


def continued(
    model: TextModel, texts: Sequence[str], new_tokens: int, *, progress: bool = False
) -> Summaries:
    """Greedy: the first line that the model writes after each text and CUE.

    Raises DataError: no room for cue and summary, or an empty text.
    """
    cue, sources = model.tokenizer.encode(CUE), model.tokenizer.encode_batch(list(texts))
    used = len(cue) + len(model.begin)
    room = model.config.max_length - new_tokens - used
    if room < 1:
        raise _no_room(model, used, new_tokens)
    prompts = [with_begin(model.begin, np.concatenate([ids[:room], cue])) for ids in sources]
    read = [min(len(ids), room) for ids in sources]
    return _summaries(model, prompts, sources, read, new_tokens, ("\n",), progress)


def answered(
    model: TextModel,
    texts: Sequence[str],
    new_tokens: int,
    *,
    instruction: str = INSTRUCTION,
    progress: bool = False,
) -> Summaries:
    """Greedy: the model's answer to the instruction and each text as a user's message.

    Raises DataError: no chat template, no room for instruction and summary, or an empty text.
    """
    tokenizer = model.tokenizer

    def prompt(text: str) -> np.ndarray:
        message = {"role": "user", "content": f"{instruction}\n\n{text}"}
        return chat_ids(tokenizer, model.stated, [message])

    sources = tokenizer.encode_batch(list(texts))
    most = model.config.max_length - new_tokens
    prompts, read = [], []
    for text, ids in zip(texts, sources, strict=True):
        whole, count = prompt(text), len(ids)
        while len(whole) > most:  # more than once if the text has other tokens beside the template
            count -= len(whole) - most
            if count < 1:
                raise _no_room(model, len(prompt("")), new_tokens)
            whole = prompt(tokenizer.decode(ids[:count]))
        prompts.append(whole)
        read.append(count)
    return _summaries(model, prompts, sources, read, new_tokens, (), progress)


def _no_room(model: TextModel, used: int, new_tokens: int) -> DataError:
    return DataError(
        f"got a model with {model.config.max_length} positions, expected room for a text, {used} tokens around it and "
        f"{new_tokens} of answer"
    )


def _summaries(
    model: TextModel,
    prompts: Sequence[np.ndarray],
    sources: Sequence[np.ndarray],
    read: Sequence[int],
    new_tokens: int,
    stop: tuple[str, ...],
    progress: bool,
) -> Summaries:
    for number, ids in enumerate(sources):
        if not len(ids):
            raise DataError(f"got text {number} without a token, expected something to summarize")
    written = complete(model, prompts, new_tokens, stop=stop, progress=progress)
    cut = {i: count for i, (ids, count) in enumerate(zip(sources, read, strict=True)) if count < len(ids)}
    return Summaries([text.strip() for text in written], cut)
