"""Batched text completion."""

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

MAX_ROWS = 16  # per batch


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
    """The completion of each prompt, ending before the first stop string or end token.

    Prompts are batched by similar length, see batching.py.

    Args:
      prompts: token ids [T] each, truncated on the left if prompt and answer exceed max_length.
      seed: of the sampling; samples also depend on the position of a prompt in the list.

    Raises:
      DataError: an empty prompt, one with a token outside the model's vocabulary, or max_new_tokens that leave no
        room for a prompt.
    """
    check_text_model(model)
    room = model.config.max_length - max_new_tokens
    if room < 1 or max_new_tokens < 1:
        raise DataError(
            f"max_new_tokens: got {max_new_tokens}, expected 1 to {model.config.max_length - 1}, since the model "
            f"has {model.config.max_length} positions"
        )
    rows = [prompt[-room:] for prompt in prompts]
    sizes, answers = np.array([len(row) for row in rows]), [""] * len(rows)
    if not sizes.all():
        raise DataError("got an empty prompt, expected at least one token in each")
    for number, ids in enumerate(rows):
        check_tokens(model.config, model.tokenizer, ids, f"prompt {number}")

    def rows_of(width: int) -> int:
        rows_that_fit = max(1, min(MAX_ROWS, BATCH_TOKENS // (width + max_new_tokens)))
        return 1 << rows_that_fit.bit_length() - 1  # a power of two: few shapes, whatever max_new_tokens

    for indices, batch_rows, _ in batches(sizes, room, rows_of, progress=progress):
        batch = [rows[i] for i in indices] + [rows[indices[0]]] * (batch_rows - len(indices))
        result = generate(
            model.config,
            model.variables,
            *left_pad(batch),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=jax.random.fold_in(jax.random.key(seed), int(indices[0])),
            eos_ids=model.end,
        )
        written, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
        for row, i in enumerate(indices):
            ids = written[row, : lengths[row]]
            ids = ids[:-1] if len(ids) and ids[-1] in model.end else ids
            answers[i] = cut(model.tokenizer.decode(ids), stop)
    return answers


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first occurrence of a stop string."""
    return text[: min([text.find(word) for word in stop if word in text], default=len(text))]
