"""Token streams of documents, and the number of text bytes each token stands for.

A stream concatenates documents, separated by the tokenizer's `eos_id` (s):

    s document s document s ... document s

It begins with s, so that the first token of a text is predicted too, and ends with s, so that the model learns
when to stop. Without an `eos_id`, documents are joined directly and the first token of the stream is not predicted.

Bytes are counted in the documents, never in decoded tokens: a tokenizer may strip a space, and a window may end
inside a character. A token stands for the text from the end of the previous token to its own end, the last token of
a document also for the remaining text; a separator stands for nothing. So the bytes of a stream add up to those of
its documents, and any partition into windows counts each byte once. (The bytes of a document without tokens, such
as whitespace that the tokenizer drops, are counted at the following separator.)

Documents are encoded in batches of bounded size, long ones in pieces if the tokenizer allows it. Encoding a large
text with a tokenizer.json is slow, so the result is cached on disk, see cache.py.
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

BATCH_CHARACTERS = 1 << 20  # maximum batch size, unless the batch is a single piece that cannot be cut
PIECE_CHARACTERS = 1 << 17  # longer documents are cut where that does not change the tokens
WORD_END = re.compile(r"[^\W\d_][ \n]")  # a letter and the character that ends its word
WORD_ENDS_TRIED, AROUND_CUT = 50, 200  # candidate positions of a cut; characters compared on each side
CACHED_BYTES = 1 << 20  # minimum size of a text whose tokens are cached
LAYOUT = "bitnet_jax.tokens.1"  # cache version; change it whenever the same text gives different arrays


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
        if (cached := read_arrays(key)) is not None:
            return {name: array.astype(np.int32) for name, array in cached.items()}
    separator = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    narrow = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32  # halves the memory of intermediates
    tokens, sizes = [separator.astype(narrow)], [np.zeros(len(separator), np.int32)]
    pending_bytes = 0  # of pieces without tokens; counted at the next token or separator
    with progress_bar(total, unit="B", description="tokenizing", delay=1.0) as progress:
        for batch in _batches(documents, tokenizer):
            for piece, (ids, token_bytes) in zip(batch, _encoded(batch, tokenizer, measured), strict=True):
                end = separator if piece.ends_document else separator[:0]
                tokens.append(np.concatenate([ids, end]).astype(narrow))
                if measured:
                    row = np.concatenate([token_bytes, np.zeros(len(end), np.int32)])
                    pending_bytes += 0 if len(ids) else len(piece.text.encode())
                    if len(row):
                        row[0] += pending_bytes
                        pending_bytes = 0
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
    """All documents, long ones in pieces, in batches of at most BATCH_CHARACTERS or a single piece."""
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
    """The pieces of a document, cut between a letter and a space or newline so that the tokens do not change.

    Every tokenizer with `splits_words` ends a word there; in addition, the tokens of the text around the cut must
    equal those of its two sides encoded separately.
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
    """The first valid cut from `begin` on; None if none of the next WORD_ENDS_TRIED word ends is one."""
    for word_end in itertools.islice(WORD_END.finditer(text, begin), WORD_ENDS_TRIED):
        cut = word_end.start() + 1
        left, right = text[max(0, cut - AROUND_CUT) : cut], text[cut : cut + AROUND_CUT]
        parts = np.concatenate(tokenizer.encode_batch([left, right]))
        if np.array_equal(tokenizer.encode(left + right), parts):
            return cut
    return None


def _encoded(
    batch: Sequence[_Piece], tokenizer: Tokenizer, measured: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids of each piece and the bytes of each id; empty unless `measured`."""
    texts = [piece.text for piece in batch]
    try:
        if measured:
            return tokenizer.encode_measured(texts)
        return [(ids, np.zeros(0, np.int32)) for ids in tokenizer.encode_batch(texts)]
    except DataError:
        for piece in batch:  # find the piece at fault
            try:
                tokenizer.encode(piece.text)
            except DataError as error:
                raise DataError(f"{piece.name}: {error}") from error
        raise


def _key(documents: Sequence[Document], tokenizer: JsonTokenizer, measured: bool) -> str:
    """Hash of everything the arrays depend on: texts, document boundaries, tokenizer and library version."""
    digest = hashlib.blake2b(digest_size=20)
    for part in (LAYOUT, str(measured), tokenizer.library_version, tokenizer.to_json()):
        digest.update(f"{len(part)}:".encode() + part.encode())
    for document in documents:
        content = document.text.encode()
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()
