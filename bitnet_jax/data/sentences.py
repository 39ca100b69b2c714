"""Sentences without labels, one per line, as token ids with the begin and end tokens of an encoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bitnet_jax.data.documents import TEST, TRAIN, VALID, check_held_out, hashed_part, unit_hash
from bitnet_jax.data.errors import DataError, check_number
from bitnet_jax.data.files import decode
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
    cuts = test and valid_source is None
    parts: dict[int, list[str]] = {TRAIN: [], VALID: [], TEST: []}
    if valid_source is None or test:
        check_held_out(valid_fraction, cuts)
    for text in _lines(source, root):
        side = (
            TRAIN
            if valid_source is not None and not test
            else hashed_part(unit_hash(text), valid_fraction, cuts)
        )
        parts[side].append(text)
    if valid_source is not None:
        parts[TEST if test else VALID] = _lines(valid_source, root)
    parts[TRAIN] = parts[TRAIN][:limit]
    wanted = (TRAIN, VALID, TEST)[: 2 + test]
    if not all(parts[part] for part in wanted):
        raise DataError(
            f"{source}: got {' and '.join(str(len(parts[part])) for part in wanted)} texts to train on and held out, "
            "expected at least one each; use more text, another data.valid_fraction or data.valid_source"
        )
    encoded = [_encode(parts[part], tokenizer, length, begin, end) for part in wanted]
    return SentenceParts(encoded[0], encoded[1], encoded[2] if test else None)


def _lines(source: str, root: str | os.PathLike[str] | None) -> list[str]:
    path = resolve_path(source, root)
    texts = (checked_text(decode(line, f"{path}:{number}"), str(path)) for number, line in read_lines(path))
    return list(dict.fromkeys(text for line in texts if (text := line.strip())))


def _encode(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, begin: Sequence[int], end: Sequence[int]
) -> Sentences:
    inputs, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
    room = length - len(begin) - len(end)
    for row, ids in enumerate(tokenizer.encode_batch(texts)):
        tokens = [*begin, *ids[:room], *end]
        inputs[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    return {"inputs": inputs, "mask": mask}
