"""What a model knows nothing of: tokens outside its vocabulary, and sequences longer than those of its training.

A tokenizer with more tokens than the model is usable for every text without the others; a model continues beyond its
trained length, badly. Both are a warning; a token that the model lacks is an error where it occurs.
"""

from __future__ import annotations

import warnings

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.models import ModelConfig


def warn_of_unknown_tokens(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """A UserWarning where the tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        warnings.warn(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: a text with one of the "
            "others is refused; is the tokenizer the model's own?",
            stacklevel=3,
        )


def check_tokens(config: ModelConfig, tokenizer: Tokenizer, ids: np.ndarray, where: str) -> None:
    """Raises DataError, which names the token, if `ids` holds one outside the model's vocabulary."""
    unknown = ids[ids >= config.vocab_size]
    if unknown.size:
        name = tokenizer.decode(unknown[:1])  # nothing for a special token
        raise DataError(
            f"{where}: got the token {name!r} with the id {unknown[0]}, expected ids below {config.vocab_size}, the "
            "model's vocabulary; leave it out, or use the tokenizer the model was trained with"
        )


def warn_beyond_training(config: ModelConfig, length: int, remedy: str, stacklevel: int = 2) -> None:
    """A UserWarning where sequences of `length` tokens are longer than those that the model was trained with."""
    if length > config.known_length:
        warnings.warn(
            f"got sequences of {length} tokens, the model was trained with {config.known_length}: beyond them it "
            f"predicts worse than it can; {remedy}",
            stacklevel=stacklevel + 1,
        )
