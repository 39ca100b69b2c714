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

Documents are encoded in batches of bounded size, long ones in pieces if the tokenizer allows it, and the stream is made
in blocks, so that text and tokens of any size pass through bounded memory (see corpus.py for their cache on disk).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bitnet_jax.data.documents import AnyDocument
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer

BATCH_CHARACTERS = 1 << 20  # maximum batch size, unless the batch is a single piece that cannot be cut
PIECE_CHARACTERS = 1 << 17  # longer documents are cut where that does not change the tokens
WORD_END = re.compile(r"[^\W\d_][ \n]")  # a letter and the character that ends its word
WORD_ENDS_TRIED, AROUND_CUT = 50, 200  # candidate positions of a cut; characters compared on each side


class MeasuredStream(NamedTuple):
    tokens: np.ndarray  # int [N]
    token_bytes: np.ndarray  # int32 [N], bytes of text that each token stands for


class Block(NamedTuple):
    """Consecutive tokens of a stream."""

    tokens: np.ndarray  # int32 [n]
    token_bytes: np.ndarray  # int32 [n]; [0] unless measured
    text_bytes: int  # of the text that was encoded
    documents: int  # that end in this block


def token_stream(documents: Iterable[AnyDocument], tokenizer: Tokenizer) -> np.ndarray:
    """int32 [N], see the module docstring. Raises DataError for a text that cannot be encoded."""
    return np.concatenate([block.tokens for block in stream_blocks(documents, tokenizer, measured=False)])


def measured_stream(documents: Iterable[AnyDocument], tokenizer: Tokenizer) -> MeasuredStream:
    """`token_stream` and the bytes of each of its tokens, int32."""
    blocks = list(stream_blocks(documents, tokenizer, measured=True))
    tokens, token_bytes, _, _ = zip(*blocks, strict=True)
    return MeasuredStream(np.concatenate(tokens), np.concatenate(token_bytes))


def stream_blocks(documents: Iterable[AnyDocument], tokenizer: Tokenizer, measured: bool) -> Iterator[Block]:
    """The stream of the documents in blocks; with the bytes of each token if `measured`."""
    separator = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    no_bytes = np.zeros(0, np.int32)
    yield Block(separator, np.zeros(len(separator), np.int32) if measured else no_bytes, 0, 0)
    pending_bytes = 0  # of pieces without tokens; counted at the next token or separator
    for batch in _batches(documents, tokenizer):
        tokens, sizes, text_bytes, ended = [], [no_bytes], 0, 0
        for piece, (ids, token_bytes) in zip(batch, _encoded(batch, tokenizer, measured), strict=True):
            end = separator if piece.ends_document else separator[:0]
            tokens.append(np.concatenate([ids, end]))
            size = len(piece.text.encode())
            if measured:
                row = np.concatenate([token_bytes, np.zeros(len(end), np.int32)])
                pending_bytes += 0 if len(ids) else size
                if len(row):
                    row[0] += pending_bytes
                    pending_bytes = 0
                sizes.append(row)
            text_bytes += size
            ended += piece.ends_document
        yield Block(np.concatenate(tokens), np.concatenate(sizes), text_bytes, ended)


class _Piece(NamedTuple):
    name: str  # of its document
    text: str
    ends_document: bool


def _batches(documents: Iterable[AnyDocument], tokenizer: Tokenizer) -> Iterator[list[_Piece]]:
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


def _pieces(document: AnyDocument, tokenizer: Tokenizer) -> Iterator[_Piece]:
    """The pieces of a document, cut so that the tokens do not change: anywhere for bytes and characters, nowhere for
    tokenizers that do not split words, else between a letter and a space or newline.

    Every tokenizer with `splits_words` ends a word there; in addition, the tokens of the text around the cut must
    equal those of its two sides encoded separately.
    """
    anywhere = isinstance(tokenizer, ByteTokenizer | CharTokenizer)
    text, searched = "", 0  # there is no valid cut up to here
    for part in document.parts():
        if anywhere and text:
            yield _Piece(document.name, text, ends_document=False)
            text = ""
        text += part
        if isinstance(tokenizer, JsonTokenizer) and tokenizer.splits_words:
            start = 0
            while len(text) - start > PIECE_CHARACTERS:
                cut = _cut(text, max(start + PIECE_CHARACTERS, searched), tokenizer)
                if cut is None:
                    searched = len(text)
                    break
                yield _Piece(document.name, text[start:cut], ends_document=False)
                start = cut
            text, searched = text[start:], max(searched - start, 0)
    yield _Piece(document.name, text, ends_document=True)


def _cut(text: str, begin: int, tokenizer: JsonTokenizer) -> int | None:
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
