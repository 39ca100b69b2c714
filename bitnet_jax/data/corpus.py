"""One call from the `data` section of a config to token streams: read, split, tokenize, join.

A stream is what the model sees of several documents, separated by the tokenizer's `eos_id` (s):

    s document s document s ... document s

It begins with s, so the first token of a text is predicted too, and ends with one, so that the model learns
when to stop. A tokenizer without `eos_id` joins the documents directly; the first token of the stream is then
given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.text import Document, read_documents, resolve_path, split_documents, text_bytes
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, from_json


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two token streams and what they were made of."""

    tokenizer: Tokenizer
    train: np.ndarray  # int32 [N]
    valid: np.ndarray  # int32 [M]
    train_documents: int
    valid_documents: int
    train_bytes: int  # of UTF-8 text
    valid_bytes: int
    skipped: tuple[str, ...]  # files left out, see Documents

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
) -> Corpus:
    """Read, split, tokenize.

    Args:
      source: see bitnet_jax.data.text.
      tokenizer: `byte`, `char` (the symbols of the whole text), the path of a `tokenizer.json`, or a
      tokenizer.
      split: `document`, `tail` or `record`, see `split_documents`.
      valid_fraction: share to hold out.
      valid_source: hold out all of this source instead; `split` and `valid_fraction` are then not looked at.
      root: folder that relative paths are meant below, see `read_documents`.
    """
    documents, skipped = read_documents(source, root)
    if valid_source is None:
        train, valid = split_documents(documents, split, valid_fraction)
    else:
        train, (valid, more) = documents, read_documents(valid_source, root)
        documents, skipped = documents + valid, skipped + more
    made = load_tokenizer(tokenizer, documents, root) if isinstance(tokenizer, str) else tokenizer
    return Corpus(
        tokenizer=made,
        train=token_stream(train, made),
        valid=token_stream(valid, made),
        train_documents=len(train),
        valid_documents=len(valid),
        train_bytes=text_bytes(train),
        valid_bytes=text_bytes(valid),
        skipped=skipped,
    )


def load_tokenizer(
    name: str, documents: Sequence[Document] = (), root: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """`byte`, `char` (made from the documents; NUL separates them where there are several), or a path."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.fit((d.text for d in documents), separator="\0" if len(documents) > 1 else None)
    path = resolve_path(name, root)
    try:
        return from_json(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: got no readable UTF-8 file ({error}), expected a tokenizer.json") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """int32 [N], see the module docstring."""
    separator = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    parts = [separator]
    for document in documents:
        try:
            parts += [tokenizer.encode(document.text), separator]
        except DataError as error:
            raise DataError(f"{document.name}: {error}") from error
    return np.concatenate(parts)
