"""From the `data` section of a config to token streams in one call: read, split, tokenize, join (streams.py)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.files import JSON_BYTES, decode, read_file
from bitnet_jax.data.streams import measured_stream, token_stream
from bitnet_jax.data.text import Document, read_documents, resolve_path, split_documents, text_bytes
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, from_json


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out token streams, their tokenizer and their sizes."""

    tokenizer: Tokenizer
    train: np.ndarray  # int32 [N]
    valid: np.ndarray  # int32 [M]
    valid_token_bytes: np.ndarray  # int32 [M]: bytes of text that each held-out token stands for
    train_documents: int
    valid_documents: int
    train_bytes: int  # of UTF-8 text
    valid_bytes: int  # the sum of valid_token_bytes
    skipped: tuple[str, ...]  # skipped files, see Documents

    def summary(self) -> dict[str, int | str]:
        """Figures for a log or a result file."""
        return {
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "train_documents": self.train_documents,
            "valid_documents": self.valid_documents,
            "train_bytes": self.train_bytes,
            "valid_bytes": self.valid_bytes,
            "train_tokens": len(self.train),
            "valid_tokens": len(self.valid),
            "skipped_files": len(self.skipped),
        }


def load_corpus(
    source: str = "stdlib",
    *,
    tokenizer: str | Tokenizer = "byte",
    split: str = "document",
    valid_fraction: float = 0.05,
    valid_source: str | None = None,
    root: str | os.PathLike[str] | None = None,
    skip_bad_files: bool = False,
    allow_download: bool | None = None,
) -> Corpus:
    """Read, split, tokenize.

    Args:
      source: see bitnet_jax.data.text.
      tokenizer: `byte`, `char` (the characters of the whole text), the path of a `tokenizer.json`, or a tokenizer.
      split: `document`, `tail` or `record`, see `split_documents`.
      valid_fraction: share to hold out.
      valid_source: hold out all of this source instead, ignoring `split` and `valid_fraction`.
      root, skip_bad_files, allow_download: see `read_documents`.

    Raises:
      DataError: a source or the tokenizer cannot be read, one side of the split is empty, or a text cannot be
        encoded.
    """
    read = partial(read_documents, root=root, skip_bad_files=skip_bad_files, allow_download=allow_download)
    documents, skipped = read(source)
    if valid_source is None:
        train, valid = split_documents(documents, split, valid_fraction)
    else:
        train, (valid, more) = documents, read(valid_source)
        documents, skipped = documents + valid, skipped + more
    loaded = load_tokenizer(tokenizer, documents, root) if isinstance(tokenizer, str) else tokenizer
    held_out = measured_stream(valid, loaded)
    return Corpus(
        tokenizer=loaded,
        train=token_stream(train, loaded),
        valid=held_out.tokens,
        valid_token_bytes=held_out.token_bytes,
        train_documents=len(train),
        valid_documents=len(valid),
        train_bytes=text_bytes(train),
        valid_bytes=text_bytes(valid),
        skipped=skipped,
    )


def load_tokenizer(
    name: str, documents: Sequence[Document] = (), root: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """`byte`, `char` (fitted to the documents; NUL separates them if there are several), or a path."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.fit((d.text for d in documents), separator="\0" if len(documents) > 1 else None)
    path = resolve_path(name, root)
    text = decode(read_file(path, JSON_BYTES), str(path))
    try:
        return from_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
