"""Training of byte-level BPE tokenizers (GPT-2's variant of 1508.07909), and how well a tokenizer compresses a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_jax.data.corpus import Corpus
from bitnet_jax.data.documents import AnyDocument
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import JsonTokenizer
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.progress import progress_bar

COUNTED = 1 << 24  # tokens of a stream that are counted at once


def train_bpe(
    documents: Iterable[AnyDocument],
    vocab_size: int,
    *,
    end_token: str | None = None,
    text_bytes: int | None = None,
) -> JsonTokenizer:
    """A byte-level BPE tokenizer of `vocab_size` tokens; it can encode any text.

    Args:
      documents: read once; only the words and their numbers are held in memory.
      end_token: the text of a special token that separates documents (see END_TOKENS in tokenizers.py); None: without
        special tokens.
      text_bytes: of the documents; given, progress is shown.
    Raises:
      DataError: vocab_size is below 257 (256 are the bytes), the text is too small for it, or the package tokenizers
        is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError(missing_package("tokenizers")) from error
    special = [] if end_token is None else [end_token]
    if vocab_size <= 256 + len(special):
        raise DataError(
            f"vocab_size: got {vocab_size}, expected more than the 256 bytes"
            f"{' and the end token' if special else ''}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    bar = progress_bar(
        text_bytes or 0, unit="B", description="counting words", show=text_bytes is not None, delay=1.0
    )
    with bar as progress:

        def texts() -> Iterable[str]:
            for document in documents:
                for part in document.parts():
                    yield part
                    progress.update(len(part.encode()))

        tokenizer.train_from_iterator(texts(), trainer)
    if (got := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(
            f"vocab_size: got {vocab_size}, expected at most the {got} tokens of this text; use more text"
        )
    return JsonTokenizer(tokenizer.to_str())


@dataclass(frozen=True)
class Compression:
    """How a tokenizer encodes the held-out text of a corpus."""

    vocab_size: int
    valid_bytes: int  # of held-out text
    valid_tokens: int  # that encode it, without separators
    used: float  # share of the vocabulary that occurs in the held-out text
    train_used: float  # in the training text

    @property
    def bytes_per_token(self) -> float:
        return self.valid_bytes / self.valid_tokens

    def summary(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "valid_bytes": self.valid_bytes,
            "valid_tokens": self.valid_tokens,
            "bytes_per_token": self.bytes_per_token,
            "vocabulary_used": self.used,
            "vocabulary_used_in_training": self.train_used,
        }


def measure_compression(corpus: Corpus) -> Compression:
    """Counts the tokens of a corpus. Raises DataError: the held-out text has no tokens."""
    size, end = corpus.tokenizer.vocab_size, corpus.tokenizer.eos_id
    train, valid = (_counts(stream, size) for stream in (corpus.train, corpus.valid))
    tokens = len(corpus.valid) - (0 if end is None else corpus.valid_documents + 1)
    if tokens < 1:
        raise DataError("got no tokens of held-out text, expected at least one; use another tokenizer")
    shares = (float(np.count_nonzero(counts)) / size for counts in (valid, train))
    return Compression(size, corpus.valid_bytes, tokens, *shares)


def _counts(stream: np.ndarray, size: int) -> np.ndarray:
    """int64 [size]: how often each token occurs."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(stream), COUNTED):
        counts += np.bincount(stream[start : start + COUNTED], minlength=size)
    return counts
