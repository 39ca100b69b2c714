"""Labelled texts for a classifier: JSON lines, and a source built from the standard library.

A source is one of

    keywords               lines of the standard library; the class is the leading keyword, removed from the text
    FILE.jsonl[.gz]        one example per line: {"text": ..., "label": an integer or a string}
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax.data import standard_library
from bitnet_jax.data.corpus import load_tokenizer
from bitnet_jax.data.documents import Document, split_by_hash, unit_hash
from bitnet_jax.data.errors import DataError, check_number
from bitnet_jax.data.text import checked_text, json_lines, resolve_path
from bitnet_jax.data.tokenizers import Tokenizer

KEYWORDS = ("class", "def", "for", "if", "raise", "return")
KEYWORD_EXAMPLES = 500  # per class


class Example(NamedTuple):
    text: str
    label: int | str


class LabelledText(NamedTuple):
    """Token ids of the parts, truncated or padded to one length; `mask` is False for padding."""

    tokenizer: Tokenizer
    classes: tuple[int | str, ...]  # label of each class
    train: dict[str, np.ndarray]  # inputs int32 [N, T], mask bool [N, T], targets int32 [N]
    valid: dict[str, np.ndarray]
    test: dict[str, np.ndarray] | None = None


def load_labelled_text(
    source: str = "keywords",
    *,
    length: int,
    tokenizer: str | Tokenizer = "byte",
    valid_source: str | None = None,
    valid_fraction: float = 0.1,
    test: bool = False,
    limit: int | None = None,
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[int | str] | None = None,
) -> LabelledText:
    """Read, split, tokenize.

    Args:
      length: T; longer texts are truncated.
      tokenizer: a name, see `load_corpus`, or a tokenizer.
      valid_source: hold out all of it; None: the share `valid_fraction` of `source`, chosen by a hash of the text.
      test: also hold out a test part: as much again, or all of valid_source, and then `valid` is split off `source`.
      limit: use at most the first `limit` training examples.
      root: base folder of relative paths, see `resolve_path`.
      classes: the labels of a trained model, in its order; None: the sorted labels of the training part.

    Raises:
      DataError: a source cannot be read, a part is empty, or a label is not among the classes.
    """
    check_number("length", length)
    check_number("limit", limit)
    held_out = None if valid_source is None else read_examples(valid_source, root)
    examples = read_examples(source, root)
    train, valid, tested = split_by_hash(
        examples, lambda example: example.text, valid_fraction, test, held_out
    )
    train = train[:limit]
    if not train or not valid or (test and not tested):
        raise DataError(
            f"{source}: got {len(train)} texts to train on and {len(valid)}{f' and {len(tested)}' * test} held out, "
            "expected at least one each; use another data.valid_fraction or data.valid_source"
        )
    if classes is None:
        kinds = {type(example.label) for example in train}
        if len(kinds) > 1:
            raise DataError(f"{source}: got both integer and string labels, expected one type")
        classes = sorted({example.label for example in train})
    for part, of_part in (("training", train), ("held-out", valid), ("test", tested)):
        unknown = sorted({str(example.label) for example in of_part if example.label not in classes})
        if unknown:
            raise DataError(f"{source}: got {part} labels {unknown[:8]} that no training text has")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, [Document("", example.text) for example in train], root)
    parts = (_encode(part, classes, tokenizer, length) for part in (train, valid, tested)[: 2 + test])
    return LabelledText(tokenizer, tuple(classes), *parts)


def _encode(
    examples: list[Example], classes: Sequence[int | str], tokenizer: Tokenizer, length: int
) -> dict[str, np.ndarray]:
    numbers = {label: number for number, label in enumerate(classes)}
    targets = np.array([numbers[example.label] for example in examples], np.int32)
    return encode_texts([example.text for example in examples], tokenizer, length) | {"targets": targets}


def encode_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    begin: Sequence[int] = (),
    end: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Texts between begin and end tokens, cut to fit: inputs int32 [N, length] and mask bool [N, length], False for
    padding."""
    inputs = np.zeros((len(texts), length), np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = [*begin, *tokenizer.encode(text)[: length - len(begin) - len(end)], *end]
        inputs[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return {"inputs": inputs, "mask": mask}


def read_examples(source: str, root: str | os.PathLike[str] | None = None) -> list[Example]:
    """All examples of a source (see the module docstring), in order. Raises DataError."""
    if source == "keywords":
        return _keyword_examples()
    path = resolve_path(source, root)
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise DataError(f"got {path}, expected FILE.jsonl or FILE.jsonl.gz; correct data.source")
    return [_example(record, where) for where, record in json_lines(path)]


def _example(record: Any, where: str) -> Example:
    text = record.get("text") if isinstance(record, dict) else None
    label = record.get("label") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text or not isinstance(label, int | str) or isinstance(label, bool):
        raise DataError(
            f'{where}: got no text or no label, expected {{"text": "...", "label": an integer or a string}}'
        )
    return Example(checked_text(text, where), label)


def _keyword_examples() -> list[Example]:
    """KEYWORD_EXAMPLES distinct lines per keyword, ordered by a hash."""
    root = standard_library.folder()
    lines: dict[str, set[str]] = {keyword: set() for keyword in KEYWORDS}
    for path in standard_library.source_files(root):
        for line in _text_lines(path):
            keyword, _, rest = line.strip().partition(" ")
            if keyword in lines and len(rest.strip()) > 3:
                lines[keyword].add(rest.strip())
    few = {keyword: len(found) for keyword, found in lines.items() if len(found) < KEYWORD_EXAMPLES}
    if few:
        raise DataError(f"{root}: got only {few} lines, expected {KEYWORD_EXAMPLES} of each keyword")
    # Not the hash of the held-out split: taking its smallest values would bias the split.
    order = {
        Example(text, keyword): unit_hash(f"{keyword} {text}") for keyword in lines for text in lines[keyword]
    }
    chosen = [
        example
        for keyword in KEYWORDS
        for example in sorted((e for e in order if e.label == keyword), key=order.__getitem__)[
            :KEYWORD_EXAMPLES
        ]
    ]
    return sorted(chosen, key=order.__getitem__)


def _text_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError):  # a few files declare another encoding on purpose
        return []
