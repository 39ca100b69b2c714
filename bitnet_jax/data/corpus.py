"""From the `data` section of a config to token streams in one call: read, split, tokenize, join (streams.py).

Documents pass through: a source is read once to find out what is held out, and once for each part. The streams of a
small source are int32 arrays. Those of a large one, or of one that is slow to tokenize, are written to the cache on
disk (cache.py) in the smallest type that holds the vocabulary, and mapped into memory: as many pages as are used.
Their key is made of the contents of the files (digests.py), the tokenizer and the split.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.data.cache import Entry, Writer, cache_folder, cached
from bitnet_jax.data.digests import Contents, contents
from bitnet_jax.data.documents import TEST, TRAIN, VALID, AnyDocument, Split, text_bytes
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.files import FILE_VARIABLE, JSON_BYTES, LINE_VARIABLE, decode, read_file, report_reads
from bitnet_jax.data.streams import MeasuredStream, stream_blocks
from bitnet_jax.data.text import Source, resolve_path
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer, from_json
from bitnet_jax.progress import Progress, progress_bar

# Least size of the files of a source whose streams are kept on disk: with a tokenizer.json, which is slow, and others.
SLOW_BYTES, LARGE_BYTES = 1 << 20, 1 << 26
LAYOUT = "bitnet_jax.tokens.2"  # change it whenever the same text gives different arrays

Append = Callable[[str, np.ndarray], None]
Make = Callable[[Append, Sequence[Iterable[AnyDocument]]], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out token streams, their tokenizer and their sizes."""

    tokenizer: Tokenizer
    train: np.ndarray  # int [N]: int32, or of a narrower type on disk
    valid: np.ndarray  # int [M], likewise
    valid_token_bytes: np.ndarray  # int32 [M]: bytes of text that each held-out token stands for
    train_documents: int
    valid_documents: int
    train_bytes: int  # of UTF-8 text
    valid_bytes: int  # the sum of valid_token_bytes
    skipped: tuple[str, ...]  # skipped files, see Documents
    fingerprint: int  # CRC-32 of the training tokens as int32
    test: MeasuredStream | None = None  # of the test part, if asked for
    test_documents: int = 0
    test_bytes: int = 0

    def summary(self) -> dict[str, int | str | list[str]]:
        """Figures for a log or a result file; with the names of skipped files, if there are any."""
        test = {} if self.test is None else {"test_tokens": len(self.test.tokens)}
        test |= {"test_documents": self.test_documents, "test_bytes": self.test_bytes} if test else {}
        return {
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "train_documents": self.train_documents,
            "valid_documents": self.valid_documents,
            "train_bytes": self.train_bytes,
            "valid_bytes": self.valid_bytes,
            "train_tokens": len(self.train),
            "valid_tokens": len(self.valid),
            **test,
            "skipped_files": len(self.skipped),
            **({"skipped": list(self.skipped)} if self.skipped else {}),
        }


def load_corpus(
    source: str = "stdlib",
    *,
    tokenizer: str | Tokenizer = "byte",
    split: str = "document",
    valid_fraction: float = 0.05,
    valid_source: str | None = None,
    test: bool = False,
    root: str | os.PathLike[str] | None = None,
    skip_bad_files: bool = False,
    allow_download: bool | None = None,
) -> Corpus:
    """Read, split, tokenize.

    Args:
      source: see bitnet_jax.data.text.
      tokenizer: `byte`, `char` (the characters of the whole text), the path of a `tokenizer.json`, or a tokenizer.
      split: `document`, `tail` or `record`, see `split_documents`.
      valid_fraction: share to hold out.
      valid_source: hold out all of this source instead, ignoring `split` and `valid_fraction`.
      test: also hold out a test part: as much again as `valid_fraction` (before the end of the text for `tail`, the
        valid part moves forward; records with split `test`), or all of valid_source, and then the valid part is
        split off `source`.
      root, skip_bad_files, allow_download: see `Source`.

    Raises:
      DataError: a source or the tokenizer cannot be read, one side of the split is empty, or a text cannot be
        encoded.
    """
    names, splits = ("train", "valid", "test")[: 2 + test], valid_source is None or test
    opened = partial(Source, root=root, skip_bad_files=skip_bad_files, allow_download=allow_download)
    sources = [opened(name) for name in (source, valid_source) if name is not None]
    fixed = (
        load_tokenizer(tokenizer, root=root)
        if tokenizer != "char" and isinstance(tokenizer, str)
        else tokenizer
    )

    def make(append: Append, documents: Sequence[Iterable[AnyDocument]]) -> dict[str, Any]:
        with _reading(sources):
            if splits:
                made = Split.of(documents[0], split, valid_fraction, test and valid_source is None)
                parts = [made.part(documents[0], part) for part in (TRAIN, VALID, TEST)][: 2 + made.test]
                parts += [iter(one) for one in documents[1:]]
                total = made.text_bytes + sum(map(text_bytes, documents[1:]))
            else:
                parts = [iter(one) for one in documents]
                total = sum(map(text_bytes, documents))
        if fixed == "char":
            with _reading(sources):
                used = load_tokenizer("char", itertools.chain(*documents))
        else:
            assert not isinstance(fixed, str)
            used = fixed
        with progress_bar(total, unit="B", description="tokenizing", delay=1.0) as progress:
            values: dict[str, Any] = {
                name: _append_stream(name, part, used, name != "train", append, progress)
                for name, part in zip(names, parts, strict=True)
            }
        skipped = [name for one in sources for name in one.skipped]
        return values | {"skipped": skipped, "alphabet": used.to_json() if fixed == "char" else None}

    settings = [split, valid_fraction, *names[2:]] if splits else None
    values, arrays = _streams(sources, fixed, settings, make)
    train, valid, tested = values["train"], values["valid"], values.get("test")
    return Corpus(
        tokenizer=fixed if not isinstance(fixed, str) else from_json(values["alphabet"]),
        train=arrays["train"],
        valid=arrays["valid"],
        valid_token_bytes=arrays["valid_token_bytes"],
        train_documents=train["documents"],
        valid_documents=valid["documents"],
        train_bytes=train["text_bytes"],
        valid_bytes=valid["text_bytes"],
        skipped=tuple(values["skipped"]),
        fingerprint=train["crc32"],
        test=MeasuredStream(arrays["test"], arrays["test_token_bytes"]) if tested else None,
        test_documents=tested["documents"] if tested else 0,
        test_bytes=tested["text_bytes"] if tested else 0,
    )


def load_stream(
    source: str,
    tokenizer: Tokenizer,
    *,
    root: str | os.PathLike[str] | None = None,
    skip_bad_files: bool = False,
    allow_download: bool | None = None,
) -> MeasuredStream:
    """All documents of a source as one stream. Arguments and errors: see `load_corpus`."""
    opened = Source(source, root, skip_bad_files=skip_bad_files, allow_download=allow_download)

    def make(append: Append, documents: Sequence[Iterable[AnyDocument]]) -> dict[str, Any]:
        with _reading([opened]):
            total = text_bytes(documents[0])
        with progress_bar(total, unit="B", description="tokenizing", delay=1.0) as progress:
            return _append_stream("all", documents[0], tokenizer, True, append, progress)

    _, arrays = _streams([opened], tokenizer, None, make)
    return MeasuredStream(arrays["all"], arrays["all_token_bytes"])


def load_tokenizer(
    name: str, documents: Iterable[AnyDocument] = (), root: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """`byte`, `char` (fitted to the documents; NUL separates them if there are several), or a path."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        symbols, count = set[str](), 0
        for document in documents:
            count += 1
            for part in document.parts():
                symbols |= set(part)
        return CharTokenizer.fit(symbols, separator="\0" if count > 1 else None)
    path = resolve_path(name, root)
    text = decode(read_file(path, JSON_BYTES), str(path))
    try:
        return from_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


@contextlib.contextmanager
def _reading(sources: Sequence[Source]) -> Iterator[None]:
    """Shows the progress of one pass over the files of the sources."""
    total = sum(source.file_bytes for source in sources)
    bar = progress_bar(total, unit="B", description="reading", delay=1.0)
    with bar as progress, report_reads(progress.update):
        yield


def _append_stream(
    name: str,
    documents: Iterable[AnyDocument],
    tokenizer: Tokenizer,
    measured: bool,
    append: Append,
    progress: Progress,
) -> dict[str, int]:
    """Appends a stream to the array `name`, if measured also to `name`_token_bytes; returns its sizes and CRC-32."""
    sizes = {"documents": 0, "text_bytes": 0, "crc32": 0}
    for block in stream_blocks(documents, tokenizer, measured):
        append(name, block.tokens.astype(_token_type(tokenizer)))
        if measured:
            append(f"{name}_token_bytes", block.token_bytes)
        sizes["documents"] += block.documents
        sizes["text_bytes"] += block.text_bytes
        sizes["crc32"] = zlib.crc32(block.tokens.view(np.uint8).data, sizes["crc32"])
        progress.update(block.text_bytes)
    return sizes


def _token_type(tokenizer: Tokenizer) -> type[np.generic]:
    types: tuple[tuple[int, type[np.generic]], ...] = ((1 << 8, np.uint8), (1 << 16, np.uint16))
    return next((type for size, type in types if tokenizer.vocab_size <= size), np.int32)


def _streams(sources: Sequence[Source], tokenizer: str | Tokenizer, settings: Any, make: Make) -> Entry:
    """The arrays that `make` appends, and the values that it returns: in memory, or from the cache.

    Args:
      settings: JSON, what they depend on besides the documents and the tokenizer.
    """
    least = SLOW_BYTES if isinstance(tokenizer, JsonTokenizer) else LARGE_BYTES
    if sum(source.file_bytes for source in sources) < least:
        blocks: dict[str, list[np.ndarray]] = {}
        values = make(
            lambda name, array: blocks.setdefault(name, []).append(array),
            [list(source) for source in sources],
        )
        return Entry(values, {name: np.concatenate(found).astype(np.int32) for name, found in blocks.items()})
    folder = cache_folder()
    if folder is None:
        return cached(None, lambda writer: make(writer.append, sources))
    known = [_contents(source, folder) for source in sources]

    def make_checked(writer: Writer) -> dict[str, Any]:
        values = make(writer.append, sources)
        for one in known:
            one.check_unchanged()
        return values

    if isinstance(tokenizer, str):
        described = [tokenizer]
    else:
        described = [tokenizer.to_json(), getattr(tokenizer, "library_version", "")]
    parts = [LAYOUT, [one.digest for one in known], described, settings]
    parts += [source.skip_bad_files for source in sources]
    parts += [os.environ.get(name) for name in (FILE_VARIABLE, LINE_VARIABLE)]
    return cached(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40], make_checked)


def _contents(source: Source, folder: Path) -> Contents:
    place = hashlib.sha256(str(source.folder or source.files[0][1]).encode()).hexdigest()[:24]
    return contents(source.files, folder / "contents" / f"{place}.json")
