"""Documents, and which of them are for training and which are held out.

A long text file is a LongDocument, which holds no text: its parts are read whenever they are needed.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from bitnet_jax.data.errors import DataError, check_share
from bitnet_jax.data.files import invalid_utf8, read_blocks

Found = TypeVar("Found")
SPLITS = ("document", "tail", "record")
HELD_OUT_NAMES = ("valid", "validation", "dev")


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
    text_bytes: int = 0  # of the documents of both sides
    _characters: array[int] = field(default_factory=lambda: array("q"))  # of each document
    _held_out: bytearray = field(default_factory=bytearray)  # of each document: 0 no, 1 yes, 2 it is ignored

    @classmethod
    def of(cls, documents: Iterable[AnyDocument], kind: str, fraction: float) -> Split:
        """Reads all documents once. Raises DataError: an invalid split, or one without documents on one side."""
        if kind not in SPLITS:
            raise DataError(f"split: got {kind!r}, expected one of {', '.join(SPLITS)}; correct data.split")
        if kind != "record":
            check_share("valid_fraction", fraction)
        made = cls(kind, fraction)
        for document in documents:
            made._add(document)
        train, valid = made.counts()
        if not train or not valid:
            advice = {
                "document": "use data.split=tail, or another data.valid_fraction",
                "tail": "use more text, or another data.valid_fraction",
                "record": "give each record a field split (train, valid), or use data.split=document or tail",
            }[kind]
            raise DataError(
                f"split {kind!r} of {len(made._held_out)} documents: got {train} to train on and {valid} "
                f"held out, expected at least one each; {advice}"
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
        side = 0
        if self.kind == "document":
            side = int(_unit(digest.digest()) < self.fraction)
        elif self.kind == "record":
            side = 1 if document.split in HELD_OUT_NAMES else 0 if document.split == "train" else 2
        self.text_bytes += size if side < 2 else 0
        self._characters.append(characters)
        self._held_out.append(side)

    def counts(self) -> tuple[int, int]:
        """Documents for training, and held out; the one that the boundary of a `tail` is in counts as both."""
        if self.kind != "tail":
            return self._held_out.count(0), self._held_out.count(1)
        sides = [self._sides(size, left) for size, left in self._before_boundary()]
        return sum(train > 0 for train, _ in sides), sum(valid > 0 for _, valid in sides)

    def part(self, documents: Iterable[AnyDocument], held_out: bool) -> Iterator[AnyDocument]:
        """The documents of one side, in order. `documents` are those of `of`."""
        if self.kind != "tail":
            yield from (document for document, side in _paired(documents, self._held_out) if side == held_out)
            return
        for document, (size, left) in _paired(documents, self._before_boundary()):
            train, valid = self._sides(size, left)
            if train and valid:
                yield document.between(train, size) if held_out else document.between(0, train)
            elif (valid if held_out else train) > 0:
                yield document

    def _before_boundary(self) -> Iterator[tuple[int, int]]:
        """Of each document: its characters, and those from its start to the boundary."""
        left = int(sum(self._characters) * (1 - self.fraction))
        for size in self._characters:
            yield size, left
            left -= size

    @staticmethod
    def _sides(size: int, left: int) -> tuple[int, int]:
        train = min(max(left, 0), size)
        return train, size - train


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
    train, valid = (tuple(made.part(documents, held_out)) for held_out in (False, True))
    return train, valid  # type: ignore[return-value]  # the parts of Documents are Documents


def unit_hash(text: str) -> float:
    """A hash of the text in [0, 1), the same on every machine and Python version."""
    return _unit(hashlib.blake2b(text.encode(), digest_size=6).digest())


def _unit(digest: bytes) -> float:
    return int.from_bytes(digest, "big") / 2**48
