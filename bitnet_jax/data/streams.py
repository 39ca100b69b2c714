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

Documents are encoded in batches of bounded size, long ones in pieces where the tokenizer allows it. What a
tokenizer of a file makes of a large text takes long, and is kept for the next start, see cache.py.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bitnet_jax.data.cache import read_arrays, write_arrays
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.text import Document, text_bytes
from bitnet_jax.data.tokenizers import JsonTokenizer, Tokenizer
from bitnet_jax.progress import progress_bar

BATCH_CHARACTERS = 1 << 20  # of a batch of documents, at most, unless it is one piece that cannot be cut
PIECE_CHARACTERS = 1 << 17  # of a document, from which on it is cut where that changes nothing
WORD_END = re.compile(r"[^\W\d_][ \n]")  # a letter, and what ends its word
WORD_ENDS_TRIED, AROUND_CUT = 50, 200  # places looked at for a cut; characters on each side that are compared
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
    without_token = (
        0  # bytes of what no token stands for: they are those of the next one, or of the separator
    )
    with progress_bar(total, unit="B", description="tokenizing", delay=1.0) as progress:
        for batch in _batches(documents, tokenizer):
            for piece, (ids, token_bytes) in zip(batch, _encoded(batch, tokenizer, measured), strict=True):
                behind = separator if piece.ends_document else separator[:0]
                tokens.append(np.concatenate([ids, behind]).astype(narrow))
                if measured:
                    row = np.concatenate([token_bytes, np.zeros(len(behind), np.int32)])
                    without_token += 0 if len(ids) else len(piece.text.encode())
                    if len(row):
                        row[0] += without_token
                        without_token = 0
                    sizes.append(row)
                progress.update(len(piece.text.encode()))
    arrays = {"tokens": np.concatenate(tokens)}
    if measured:
        arrays["token_bytes"] = np.concatenate(sizes)
    if key is not None:
        write_arrays(key, arrays)
    return {name: array.astype(np.int32) for name, array in arrays.items()}


class _Piece(NamedTuple):
    name: str  # of its document
    text: str
    ends_document: bool


def _batches(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[_Piece]]:
    """All documents, long ones in pieces, in batches of BATCH_CHARACTERS or one piece."""
    batch, size = list[_Piece](), 0
    for document in documents:
        for piece in _pieces(document, tokenizer):
            if batch and size + len(piece.text) > BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += len(piece.text)
    if batch:
        yield batch


def _pieces(document: Document, tokenizer: Tokenizer) -> Iterator[_Piece]:
    """A document, cut where the tokens stay the same: between a letter and a blank or line end.

    A word ends there for every tokenizer that splits texts into words first (`splits_words`); and it is done only if
    the tokens of the text around the cut are those of its two sides.
    """
    name, text, _ = document
    start = 0
    while (
        isinstance(tokenizer, JsonTokenizer)
        and tokenizer.splits_words
        and len(text) - start > PIECE_CHARACTERS
    ):
        cut = _cut(text, start + PIECE_CHARACTERS, tokenizer)
        if cut is None:
            break
        yield _Piece(name, text[start:cut], ends_document=False)
        start = cut
    yield _Piece(name, text[start:], ends_document=True)


def _cut(text: str, begin: int, tokenizer: Tokenizer) -> int | None:
    """The first place from `begin` on at which a text can be cut; None: none among the nearest ends of words."""
    for word_end in itertools.islice(WORD_END.finditer(text, begin), WORD_ENDS_TRIED):
        place = word_end.start() + 1
        left, right = text[max(0, place - AROUND_CUT) : place], text[place : place + AROUND_CUT]
        parts = np.concatenate(tokenizer.encode_batch([left, right]))
        if np.array_equal(tokenizer.encode(left + right), parts):
            return place
    return None


def _encoded(
    batch: Sequence[_Piece], tokenizer: Tokenizer, measured: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids of each piece and the bytes of each of them; none of these where they are not asked for."""
    texts = [piece.text for piece in batch]
    try:
        if measured:
            return tokenizer.encode_measured(texts)
        return [(ids, np.zeros(0, np.int32)) for ids in tokenizer.encode_batch(texts)]
    except DataError:
        for piece in batch:  # which one it is
            try:
                tokenizer.encode(piece.text)
            except DataError as error:
                raise DataError(f"{piece.name}: {error}") from error
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
