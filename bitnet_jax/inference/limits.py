"""Limits of a model: tokens outside its vocabulary, and sequences longer than those it was trained with.

A tokenizer with more tokens than the model is usable for texts that avoid the extra ones, and a model can run beyond
its trained length, though with worse predictions. Both give a warning; an out-of-vocabulary token in a text is an
error.
"""

from __future__ import annotations

import warnings

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.models import ModelConfig


def warn_of_unknown_tokens(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Warns (UserWarning) if the tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        warnings.warn(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: a text with one of the "
            "extra tokens is refused; does the tokenizer belong to the model?",
            stacklevel=3,
        )


def check_tokens(config: ModelConfig, tokenizer: Tokenizer, ids: np.ndarray, where: str) -> None:
    """Raises DataError, naming the token, if `ids` contains one outside the model's vocabulary."""
    unknown = ids[ids >= config.vocab_size]
    if unknown.size:
        name = tokenizer.decode(unknown[:1])  # empty for a special token
        raise DataError(
            f"{where}: got the token {name!r} with the id {unknown[0]}, expected ids below {config.vocab_size}, the "
            "model's vocabulary; leave it out, or use the tokenizer the model was trained with"
        )


def warn_beyond_training(config: ModelConfig, length: int, remedy: str, stacklevel: int = 2) -> None:
    """Warns (UserWarning) if sequences of `length` tokens are longer than those the model was trained with."""
    if length > config.known_length:
        warnings.warn(
            f"got sequences of {length} tokens, the model was trained with {config.known_length}: beyond that its "
            f"predictions degrade; {remedy}",
            stacklevel=stacklevel + 1,
        )
