"""Training of byte-level BPE tokenizers (GPT-2's variant of 1508.07909)."""

from __future__ import annotations

from collections.abc import Iterable

from bitnet_jax.data.documents import Document
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import JsonTokenizer
from bitnet_jax.optional_packages import missing_package


def train_bpe(documents: Iterable[Document], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE tokenizer of `vocab_size` tokens without special tokens; it can encode any text.

    Raises:
      DataError: vocab_size is below 257 (256 are the bytes), the text is too small for it, or the package tokenizers
        is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError(missing_package("tokenizers")) from error
    if vocab_size <= 256:
        raise DataError(f"vocab_size: got {vocab_size}, expected more than the 256 bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    if (got := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(
            f"vocab_size: got {vocab_size}, expected at most the {got} tokens of this text; use more text"
        )
    return JsonTokenizer(tokenizer.to_str())
