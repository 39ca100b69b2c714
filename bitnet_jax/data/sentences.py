"""Sentences without labels, one per line, as token ids with the begin and end tokens of an encoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bitnet_jax.data.documents import split_by_hash
from bitnet_jax.data.errors import DataError, check_number
from bitnet_jax.data.files import decode
from bitnet_jax.data.labelled_text import encode_texts
from bitnet_jax.data.text import checked_text, read_lines, resolve_path
from bitnet_jax.data.tokenizers import Tokenizer

Sentences = dict[str, np.ndarray]  # inputs int32 [N, T], mask bool [N, T], False for padding


class SentenceParts(NamedTuple):
    train: Sentences
    valid: Sentences
    test: Sentences | None


def load_sentences(
    source: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    begin: Sequence[int] = (),
    end: Sequence[int] = (),
    valid_source: str | None = None,
    valid_fraction: float = 0.05,
    test: bool = False,
    limit: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> SentenceParts:
    """Reads, splits and tokenizes the distinct lines of a file (FILE or FILE.gz).

    Args:
      length: T, begin and end tokens included; longer texts are cut.
      valid_source, valid_fraction, test, limit, root: as in `load_labelled_text`.

    Raises:
      DataError: a file cannot be read, or a part is empty.
    """
    check_number("length", length)
    check_number("limit", limit)
    if length <= len(begin) + len(end):
        raise DataError(
            f"length: got {length}, expected more than the {len(begin) + len(end)} begin and end tokens"
        )
    held_out = None if valid_source is None else _lines(valid_source, root)
    train, valid, tested = split_by_hash(_lines(source, root), str, valid_fraction, test, held_out)
    wanted = (train[:limit], valid, tested)[: 2 + test]
    if not all(wanted):
        raise DataError(
            f"{source}: got {' and '.join(str(len(part)) for part in wanted)} texts to train on and held out, "
            "expected at least one each; use more text, another data.valid_fraction or data.valid_source"
        )
    encoded = [encode_texts(part, tokenizer, length, begin, end) for part in wanted]
    return SentenceParts(encoded[0], encoded[1], encoded[2] if test else None)


def _lines(source: str, root: str | os.PathLike[str] | None) -> list[str]:
    path = resolve_path(source, root)
    texts = (checked_text(decode(line, f"{path}:{number}"), str(path)) for number, line in read_lines(path))
    return list(dict.fromkeys(text for line in texts if (text := line.strip())))
