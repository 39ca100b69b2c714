"""Continuations of many prompts, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.batching import BATCH_TOKENS, batches
from bitnet_jax.evaluation.likelihood import TextModel, check_text_model
from bitnet_jax.inference.generation import GREEDY, generate, left_pad
from bitnet_jax.inference.limits import check_tokens
from bitnet_jax.inference.sampling import SamplingConfig

MOST_ROWS = 16  # of a batch


def complete(
    model: TextModel,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """The text behind each prompt, cut in front of the first stop string and of a separator.

    Prompts of similar length, those of a width of batching.py, stand together.

    Args:
      prompts: token ids [T] each, cut at the front where prompt and answer exceed max_length.
      seed: of what is sampled; it depends on the place of a prompt in the list too.

    Raises:
      DataError: an empty prompt, one with a token outside the model's vocabulary, or no room for one token of
        prompt beside the answer.
    """
    check_text_model(model)
    room = model.config.max_length - max_new_tokens
    if room < 1 or max_new_tokens < 1:
        raise DataError(
            f"max_new_tokens: got {max_new_tokens}, expected 1 to {model.config.max_length - 1}, for the model "
            f"has {model.config.max_length} positions"
        )
    rows = [prompt[-room:] for prompt in prompts]
    sizes, answers = np.array([len(row) for row in rows]), [""] * len(rows)
    if not sizes.all():
        raise DataError("got an empty prompt, expected at least one token in each")
    for number, ids in enumerate(rows):
        check_tokens(model.config, model.tokenizer, ids, f"prompt {number}")
    eos = () if model.tokenizer.eos_id is None else (model.tokenizer.eos_id,)

    def rows_of(width: int) -> int:
        fitting = max(1, min(MOST_ROWS, BATCH_TOKENS // (width + max_new_tokens)))
        return 1 << fitting.bit_length() - 1  # a power of two: few numbers of rows, whatever max_new_tokens

    for part, at_once, _ in batches(sizes, room, rows_of, progress=progress):
        batch = [rows[i] for i in part] + [rows[part[0]]] * (at_once - len(part))
        result = generate(
            model.config,
            model.variables,
            *left_pad(batch),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=jax.random.fold_in(jax.random.key(seed), int(part[0])),
            eos_ids=eos,
        )
        written, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
        for row, i in enumerate(part):
            ids = written[row, : lengths[row]]
            ids = ids[:-1] if len(ids) and ids[-1] in eos else ids
            answers[i] = cut(model.tokenizer.decode(ids), stop)
    return answers


def cut(text: str, stop: Sequence[str]) -> str:
    """The text in front of the first of the stop strings."""
    return text[: min([text.find(word) for word in stop if word in text], default=len(text))]
