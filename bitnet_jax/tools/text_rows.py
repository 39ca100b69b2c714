"""Rows of tokens of a text, on which two models are compared."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from bitnet_jax.data import read_documents
from bitnet_jax.data.conversation import with_begin
from bitnet_jax.model_folders import LoadedModel
from bitnet_jax.models import ModelConfig

LENGTH = 128  # tokens in a row


def text_rows(
    model: LoadedModel[ModelConfig], source: str | None, rows: int, length: int
) -> Int[np.ndarray, "B T"]:
    """int32 [at most rows, length] of a text; random tokens for a model without a tokenizer.

    Args:
      source: a file or a folder; None: Python's standard library.

    Raises ValueError: no row of the text is long enough.
    """
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)
    found: list[np.ndarray] = []
    for document in read_documents(source or "stdlib").documents:
        text = document.text[: 64 * rows * length]  # far more than the tokens that are left
        ids = model.tokenizer.encode(text)
        ids = with_begin(model.conversation.begin, ids) if model.conversation.begins_prompts else ids
        found += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        if len(found) >= rows:
            break
    if not found:
        raise ValueError(f"got fewer than {length} tokens in {source}, expected at least one row of --length")
    return np.stack(found[:rows])
