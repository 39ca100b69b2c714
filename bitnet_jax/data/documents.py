"""Documents, and which of them are for training and which are held out.

A long text file is a LongDocument, which holds no text: its parts are read whenever they are needed.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from bitnet_jax.data.errors import DataError, check_share
from bitnet_jax.data.files import invalid_utf8, read_blocks

Found = TypeVar("Found")
Item = TypeVar("Item")
SPLITS = ("document", "tail", "record")
HELD_OUT_NAMES = ("valid", "validation", "dev")
TRAIN, VALID, TEST, IGNORED = range(4)  # the parts of a split


class Document(NamedTuple):
    name: str
    text: str
    split: str | None = None  # the record's own `split` field

    def parts(self) -> Iterator[str]:
        yield self.text

    def between(self, start: int, stop: int) -> Document:
        """The characters [start, stop) as a document."""
        return self._replace(text=self.text[start:stop])


class LongDocument(NamedTuple):
    """A text file, or the characters [start, stop) of it."""

    name: str
    path: Path
    split: str | None = None
    start: int = 0
    stop: int | None = None

    def parts(self) -> Iterator[str]:
        """The text, about a MiB at a time. Raises DataError: the file is damaged or not UTF-8."""
        at = 0
        for part in _decoded(self.path):
            chosen = part[max(self.start - at, 0) : None if self.stop is None else max(self.stop - at, 0)]
            at += len(part)
            if chosen:
                yield chosen

    def between(self, start: int, stop: int) -> LongDocument:
        return self._replace(start=start, stop=stop)


AnyDocument = Document | LongDocument


def _decoded(path: Path) -> Iterator[str]:
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    for block in read_blocks(path):
        held: bytes = decoder.getstate()[0]  # the start of a character that the previous block ended in
        try:
            yield decoder.decode(block)
        except UnicodeDecodeError as error:
            raise invalid_utf8(held + block, error.start, str(path), before - len(held)) from error
        before += len(block)
    held = decoder.getstate()[0]
    if held:
        raise invalid_utf8(held, 0, str(path), before - len(held))


class Documents(NamedTuple):
    """The non-empty documents of a source."""

    documents: tuple[Document, ...]
    # Skipped files: in the standard library those that are not UTF-8; in a folder bad ones, with skip_bad_files.
    skipped: tuple[str, ...] = ()


def text_bytes(documents: Iterable[AnyDocument]) -> int:
    """Bytes of the documents' text in UTF-8."""
    return sum(len(part.encode()) for document in documents for part in document.parts())


@dataclass
class Split:
    """Which documents are held out, found in one pass over them; see `split_documents`."""

    kind: str
    fraction: float
    test: bool = False  # whether a further part is held out for the test
    text_bytes: int = 0  # of the documents that are not ignored
    _characters: array[int] = field(default_factory=lambda: array("q"))  # of each document
    _parts: bytearray = field(default_factory=bytearray)  # of each document, unless the split is a tail

    @classmethod
    def of(cls, documents: Iterable[AnyDocument], kind: str, fraction: float, test: bool = False) -> Split:
        """Reads all documents once. Raises DataError: an invalid split, or one with a part without documents."""
        if kind not in SPLITS:
            raise DataError(f"split: got {kind!r}, expected one of {', '.join(SPLITS)}; correct data.split")
        if kind != "record":
            check_held_out(fraction, test)
        made = cls(kind, fraction, test)
        for document in documents:
            made._add(document)
        train, *held_out = made.counts()
        if not train or not all(held_out):
            advice = {
                "document": "use data.split=tail, or another data.valid_fraction",
                "tail": "use more text, or another data.valid_fraction",
                "record": "give each record a field split (train, valid; test with data.test), or use "
                "data.split=document or tail",
            }[kind]
            raise DataError(
                f"split {kind!r} of {len(made._characters)} documents: got {train} to train on and "
                f"{' and '.join(map(str, held_out))} held out, expected at least one each; {advice}"
            )
        return made

    def _add(self, document: AnyDocument) -> None:
        digest, characters, size = hashlib.blake2b(digest_size=6), 0, 0
        for part in document.parts():
            content = part.encode()
            characters += len(part)
            size += len(content)
            if self.kind == "document":
                digest.update(content)
        its = TRAIN
        if self.kind == "document":
            its = hashed_part(_unit(digest.digest()), self.fraction, self.test)
        elif self.kind == "record":
            named = {name: VALID for name in HELD_OUT_NAMES} | {"train": TRAIN}
            named |= {"test": TEST} if self.test else {}
            its = named.get(document.split or "", IGNORED)
        self.text_bytes += size if its != IGNORED else 0
        self._characters.append(characters)
        self._parts.append(its)

    def counts(self) -> tuple[int, ...]:
        """Documents for training, held out, and if there is one in the test part; one that a boundary of a `tail` is
        in counts in each of its parts."""
        parts = (TRAIN, VALID, TEST) if self.test else (TRAIN, VALID)
        if self.kind != "tail":
            return tuple(self._parts.count(part) for part in parts)
        return tuple(sum(start < stop for _, start, stop in self._within(part)) for part in parts)

    def part(self, documents: Iterable[AnyDocument], part: int) -> Iterator[AnyDocument]:
        """The documents of one part, TRAIN, VALID or TEST, in order. `documents` are those of `of`."""
        if self.kind != "tail":
            yield from (document for document, its in _paired(documents, self._parts) if its == part)
            return
        for document, (size, start, stop) in _paired(documents, self._within(part)):
            if start < stop:
                yield document if (start, stop) == (0, size) else document.between(start, stop)

    def _within(self, part: int) -> Iterator[tuple[int, int, int]]:
        """Of each document: its characters, and the first and last one within a part of a `tail`."""
        total = sum(self._characters)
        ends = [int(total * (1 - self.fraction)), total]
        if self.test:
            ends.insert(0, int(total * (1 - 2 * self.fraction)))
        first, end = [0, *ends][part], ends[part]
        for size in self._characters:
            yield size, min(max(first, 0), size), min(max(end, 0), size)
            first, end = first - size, end - size


def split_by_hash(
    items: Sequence[Item],
    text: Callable[[Item], str],
    fraction: float,
    test: bool,
    held_out: Sequence[Item] | None,
) -> tuple[list[Item], list[Item], list[Item]]:
    """(train, valid, test) of short texts, each to a part by the hash of its text.

    Args:
      fraction: of the items, for each part that is cut off them.
      test: whether there is a test part.
      held_out: other items that are all of the part measured last, test if there is one, else valid.

    Raises DataError: the fraction leaves nothing to train on.
    """
    if held_out is not None and not test:
        return list(items), list(held_out), []
    cuts = test and held_out is None
    check_held_out(fraction, cuts)
    parts: dict[int, list[Item]] = {TRAIN: [], VALID: [], TEST: []}
    for item in items:
        parts[hashed_part(unit_hash(text(item)), fraction, cuts)].append(item)
    return parts[TRAIN], parts[VALID], parts[TEST] if held_out is None else list(held_out)


def hashed_part(value: float, fraction: float, test: bool) -> int:
    """TRAIN, VALID or TEST of what has this hash in [0, 1): VALID below `fraction`, and TEST up to twice that."""
    if value < fraction:
        return VALID
    return TEST if test and value < 2 * fraction else TRAIN


def check_held_out(fraction: float, test: bool) -> None:
    """Raises DataError unless `fraction` of the data, twice with a test part, leaves some to train on."""
    check_share("valid_fraction", fraction)
    if test and fraction >= 0.5:
        raise DataError(
            f"valid_fraction: got {fraction} with data.test, which holds out as much again, expected less than 0.5"
        )


def _paired(documents: Iterable[AnyDocument], found: Iterable[Found]) -> Iterator[tuple[AnyDocument, Found]]:
    try:
        yield from zip(documents, found, strict=True)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            "got other documents in a second pass over the source, expected the same; start again"
        ) from error


def split_documents(
    documents: Sequence[Document], split: str = "document", valid_fraction: float = 0.05
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Training and held-out documents.

    Args:
      documents: in the order of the source.
      split: `document`: hold out whole documents by a hash of their text, so that equal documents are on the same
        side and adding a document moves no other. `tail`: hold out the last characters of the whole text (as
        nanoGPT: the first int(N * (1 - fraction)) of N are for training), splitting the document at the boundary.
        `record`: use each record's `split` field: `train`, or one of valid, validation, dev; others are ignored.
      valid_fraction: share of the documents (`document`, in expectation) or of the characters (`tail`); unused by
        `record`.
    """
    made = Split.of(documents, split, valid_fraction)
    train, valid = (tuple(made.part(documents, part)) for part in (TRAIN, VALID))
    return train, valid  # type: ignore[return-value]  # the parts of Documents are Documents


def unit_hash(text: str) -> float:
    """A hash of the text in [0, 1), the same on every machine and Python version."""
    return _unit(hashlib.blake2b(text.encode(), digest_size=6).digest())


def _unit(digest: bytes) -> float:
    return int.from_bytes(digest, "big") / 2**48
