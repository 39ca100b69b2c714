"""Unit vectors of texts, by an encoder with `pooling`.

    ids, cut = encoder_ids(tokenizer, conversation, texts, config.known_length)
    vectors = embed(config, variables, ids)        # [texts, D]; products of rows are cosines

A text is padded to a width that follows from its own length, and shares a pass with texts of that width, so that its
vector does not depend on the other texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.inference.buckets import padded_rows, prompt_width
from bitnet_jax.inference.programs import PROGRAMS
from bitnet_jax.inference.steps import Variables
from bitnet_jax.models import ModelConfig, Transformer


def encoder_ids(
    tokenizer: Tokenizer, conversation: Conversation, texts: Sequence[str], longest: int
) -> tuple[list[np.ndarray], list[int]]:
    """int32 [T] of each text with the model's begin and end tokens, T <= longest; and which texts were cut for it."""
    begin, end = (np.array(ids, np.int32) for ids in (conversation.begin, conversation.end))
    room = longest - len(begin) - len(end)
    encoded = tokenizer.encode_batch(texts)
    cut = [i for i, ids in enumerate(encoded) if len(ids) > room]
    return [np.concatenate([begin, ids[:room], end]) for ids in encoded], cut


def embed(
    config: ModelConfig,
    variables: Variables,
    ids: Sequence[np.ndarray],
    batch_size: int = 32,
    before_pass: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "N D"]:
    """float32 unit vectors of token sequences, each of 1 to config.max_length tokens.

    Args:
      before_pass: called before each batch; what it raises ends the work.

    Raises:
      ValueError: a model without `pooling`, an empty sequence or one that is too long, or an unknown token.
    """
    if config.pooling == "none":
        raise ValueError(
            "got a model without pooling, expected an encoder of texts, such as a folder of sentence-transformers"
        )
    for i, one in enumerate(ids):
        if not 1 <= len(one) <= config.max_length:
            raise ValueError(f"text {i}: got {len(one)} tokens, expected 1 to {config.max_length}")
        if one.min() < 0 or one.max() >= config.vocab_size:
            raise ValueError(f"text {i}: got a token outside of 0 to {config.vocab_size - 1}")
    vectors = np.zeros((len(ids), config.hidden_size), np.float32)
    of_width: dict[int, list[int]] = {}
    for i, one in enumerate(ids):
        of_width.setdefault(prompt_width(config, len(one)), []).append(i)
    for width, members in of_width.items():
        program = PROGRAMS.of(_vectors, config, shapes=(batch_size, width, "packed" in variables))
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            before_pass()
            tokens, mask = padded_rows([ids[i] for i in part], batch_size, width)
            vectors[part] = np.asarray(program(variables, tokens, mask))[: len(part)]
    return vectors


def _vectors(
    config: ModelConfig, variables: Variables, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    output: Any = Transformer(config).apply(variables, tokens, mask=mask)
    return output.logits
