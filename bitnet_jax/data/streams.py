"""Documents to token streams, and the bytes of text that each token stands for.

A stream is what the model sees of several documents, separated by the tokenizer's `eos_id` (s):

    s document s document s ... document s

It begins with s, so the first token of a text is predicted too, and ends with one, so that the model learns
when to stop. A tokenizer without `eos_id` joins the documents directly; the first token of the stream is then
given.

Bytes are those of the documents themselves, never of decoded tokens: a tokenizer may strip a space, and a window
may end inside a character. A token stands for the text from where the one before it ends to where it ends itself, the
last token of a document also for what is left of it; a separator stands for nothing. So the bytes of a stream add up
to those of its documents, and any cut of it into windows counts each of them once. (A document without a
single token, of blanks that a tokenizer drops, counts at the separator behind it.)

Documents are encoded in batches of bounded size. What a tokenizer of a file makes of a large text takes long, and
is kept for the next start, see cache.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bitnet_jax.data.cache import read_arrays, write_arrays
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.progress import Progress
from bitnet_jax.data.text import Document, text_bytes
from bitnet_jax.data.tokenizers import JsonTokenizer, Tokenizer

BATCH_CHARACTERS = 1 << 20  # of a batch of documents, at most, unless it is one document
CACHED_BYTES = 1 << 20  # of text, from which on tokens are kept on disk
LAYOUT = "bitnet_jax.tokens.1"  # of what is kept; to be changed whenever the same text gives other arrays


class MeasuredStream(NamedTuple):
    tokens: np.ndarray  # int32 [N]
    token_bytes: np.ndarray  # int32 [N], bytes of text that each token stands for


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """int32 [N], see the module docstring. Raises DataError for a text that cannot be encoded."""
    return _stream(documents, tokenizer, measured=False)["tokens"]


def measured_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> MeasuredStream:
    """`token_stream` and the bytes of each of its tokens."""
    return MeasuredStream(**_stream(documents, tokenizer, measured=True))


def _stream(documents: Sequence[Document], tokenizer: Tokenizer, measured: bool) -> dict[str, np.ndarray]:
    total = text_bytes(documents)
    key = None
    if isinstance(tokenizer, JsonTokenizer) and total >= CACHED_BYTES:
        key = _key(documents, tokenizer, measured)
        if (kept := read_arrays(key)) is not None:
            return {name: array.astype(np.int32) for name, array in kept.items()}
    separator = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    narrow = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32  # half the memory until all is done
    tokens, sizes = [separator.astype(narrow)], [np.zeros(len(separator), np.int32)]
    with Progress("tokenizing", total) as progress:
        for batch in _batches(documents):
            for document, (ids, its_bytes) in zip(batch, _encoded(batch, tokenizer, measured), strict=True):
                tokens.append(np.concatenate([ids, separator]).astype(narrow))
                if measured:
                    row = np.concatenate([its_bytes, np.zeros(len(separator), np.int32)])
                    if not len(ids) and len(row):
                        row[0] = len(document.text.encode())
                    sizes.append(row)
            progress.update(text_bytes(batch))
    arrays = {"tokens": np.concatenate(tokens)}
    if measured:
        arrays["token_bytes"] = np.concatenate(sizes)
    if key is not None:
        write_arrays(key, arrays)
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def _batches(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    first = size = 0
    for i, document in enumerate(documents):
        if i > first and size + len(document.text) > BATCH_CHARACTERS:
            yield documents[first:i]
            first, size = i, 0
        size += len(document.text)
    if first < len(documents):
        yield documents[first:]


def _encoded(
    batch: Sequence[Document], tokenizer: Tokenizer, measured: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids of each document and the bytes of each of them; none of these where they are not asked for."""
    texts = [document.text for document in batch]
    try:
        if measured:
            return tokenizer.encode_measured(texts)
        return [(ids, np.zeros(0, np.int32)) for ids in tokenizer.encode_batch(texts)]
    except DataError:
        for document in batch:  # which one it is
            try:
                tokenizer.encode(document.text)
            except DataError as error:
                raise DataError(f"{document.name}: {error}") from error
        raise


def _key(documents: Sequence[Document], tokenizer: JsonTokenizer, measured: bool) -> str:
    """Hash of all that the arrays depend on: the texts and their borders, the tokenizer and its library."""
    digest = hashlib.blake2b(digest_size=20)
    for part in (LAYOUT, str(measured), tokenizer.library_version, tokenizer.to_json()):
        digest.update(f"{len(part)}:".encode() + part.encode())
    for document in documents:
        content = document.text.encode()
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()
