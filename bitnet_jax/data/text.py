"""Reading documents from a source.

A source is one of

    stdlib               the running Python's standard library (see standard_library.py)
    FILE.txt[.gz]        one document; also any file with an unknown extension
    FILE.jsonl[.gz]      one document per line: {"text": ..., "title"?: ..., "split"?: ...}
    FILE.parquet         one document per row, with the same columns (needs the package `pyarrow`)
    FOLDER               every non-hidden file below it, in sorted order
    hf:NAME[:CONFIG]     a Hugging Face dataset with a `text` column (needs the package `datasets`, and permission
                         to download, see `read_documents`)

All text is UTF-8. Reading is deterministic: the same files give the same documents in the same order.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.data import standard_library
from bitnet_jax.data.documents import AnyDocument, Document, Documents, LongDocument
from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.files import check_regular, decode, parse_json, read_file, read_lines, report_reads
from bitnet_jax.data.tables import downloaded, parquet_rows

ROOT_VARIABLE = "BITNET_JAX_DATA"
DOWNLOAD_VARIABLE = "BITNET_JAX_ALLOW_DOWNLOAD"
MAX_LISTED = 5  # bad files of a folder that an error describes
LONG_BYTES = 1 << 23  # a text file from this size on (a quarter of it, packed) is not held in memory


def read_documents(
    source: str,
    root: str | os.PathLike[str] | None = None,
    *,
    skip_bad_files: bool = False,
    allow_download: bool | None = None,
) -> Documents:
    """All documents of a source, in memory. Arguments and errors: see `Source`."""
    opened = Source(source, root, skip_bad_files=skip_bad_files, allow_download=allow_download)
    documents = tuple(
        document
        if isinstance(document, Document)
        else Document(document.name, "".join(document.parts()), document.split)
        for document in opened
    )
    return Documents(documents, opened.skipped)


class Source:
    """The non-empty documents of a source (see the module docstring), read anew in every iteration.

    Args:
      source: what to read.
      root: base folder of a relative path; default: the current folder, then $BITNET_JAX_DATA.
      skip_bad_files: skip unreadable files of a folder with a UserWarning; False: raise an error that names them.
      allow_download: whether `hf:` may use the network; None: only if $BITNET_JAX_ALLOW_DOWNLOAD is 1. Not a config
        setting, since configs may come from third parties.

    Attributes:
      files: name and path of every file, in order.
      skipped: the files that the first iteration skipped, and every other one too.

    Raises:
      DataError: the path is missing, or the download is not allowed; in an iteration: there is no text, or a file is
        damaged, beyond a limit of files.py or not UTF-8.
    """

    def __init__(
        self,
        source: str,
        root: str | os.PathLike[str] | None = None,
        *,
        skip_bad_files: bool = False,
        allow_download: bool | None = None,
    ) -> None:
        self.source, self.skip_bad_files = source, skip_bad_files
        self.folder: Path | None = None
        self.files: list[tuple[str, Path]]
        self._bad: dict[str, str] | None = None  # file -> error; None before the end of the first iteration
        if source.startswith("hf:"):
            allowed = os.environ.get(DOWNLOAD_VARIABLE) == "1" if allow_download is None else allow_download
            if not allowed:
                raise DataError(
                    f"source {source!r}: got a data set that must be downloaded, expected permission to download; "
                    f"pass --allow-download (in Python allow_download=True) or set {DOWNLOAD_VARIABLE}=1"
                )
            self.files = [(source, downloaded(source.removeprefix("hf:"), self))]
            return
        if source == "stdlib":
            self.folder = standard_library.folder()
            found: Iterable[Path] = standard_library.source_files(self.folder)
        elif (path := resolve_path(source, root)).is_dir():
            self.folder, found = path, _files_below(path)
        else:
            self.files = [(path.name, path)]
            return
        self.files = [(path.relative_to(self.folder).as_posix(), path) for path in found]

    @functools.cached_property
    def file_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for _, path in self.files)

    @property
    def skipped(self) -> tuple[str, ...]:
        return tuple(self._bad or ())

    def __iter__(self) -> Iterator[AnyDocument]:
        empty = True
        for document in self._documents():
            if not isinstance(document, Document) or document.text:
                empty = False
                yield document
        if empty:
            raise DataError(
                f"{self.source}: got no text, expected at least one non-empty document; check the source"
            )

    def _documents(self) -> Iterator[AnyDocument]:
        if self.folder is None:
            for name, path in self.files:
                yield from _file_documents(path, name)
        elif self._bad is None:
            yield from self._first_iteration(self.files, self.folder)
        else:
            for name, path in self.files:
                if name not in self._bad:
                    yield from _file_documents(path, name)

    def _first_iteration(self, files: Sequence[tuple[str, Path]], folder: Path) -> Iterator[AnyDocument]:
        """The documents of good files. Bad ones are remembered, or else reported in one error."""
        bad: dict[str, str] = {}
        for name, path in files:
            try:
                documents = _checked_documents(path, name)
            except DataError as error:
                bad[name] = str(error)
            else:
                # After a bad file that is not skipped, the others are only checked.
                if not bad or self.skip_bad_files or self.source == "stdlib":
                    yield from documents
        # A few files of the standard library declare another encoding on purpose.
        if bad and self.source != "stdlib":
            reasons = [reason.removeprefix(f"{folder}/") for reason in bad.values()][:MAX_LISTED]
            more = f", and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
            if not self.skip_bad_files:
                raise DataError(
                    f"{folder}: got {len(bad)} bad files among {len(files)}: {' | '.join(reasons)}{more}; repair or "
                    "remove them, or skip them with data.skip_bad_files=True (--skip-bad-files)"
                )
            warnings.warn(
                f"{folder}: skipped {len(bad)} bad files of {len(files)}: {' | '.join(reasons)}{more}",
                stacklevel=4,
            )
        self._bad = bad


EXPECTED_SOURCE = (
    f"an existing path (relative ones are below data.root, else the current folder or ${ROOT_VARIABLE}), "
    "source stdlib or hf:NAME, tokenizer byte or char; correct it"
)


def resolve_path(
    path: str, root: str | os.PathLike[str] | None = None, expected: str = EXPECTED_SOURCE
) -> Path:
    """The absolute path of an existing file or folder.

    Args:
      path: absolute, or relative to root; without a root, to the current folder, else to $BITNET_JAX_DATA.
      expected: for the message, what to give instead.
    Raises:
      DataError: there is none; the message lists every path tried.
    """
    if root is not None:
        bases = [Path(root)]
    else:
        data_root = os.environ.get(ROOT_VARIABLE)
        bases = [Path.cwd()] + ([Path(data_root)] if data_root else [])
    candidates = list(dict.fromkeys((base / path).absolute() for base in bases))
    try:
        for candidate in candidates:
            if candidate.exists():
                return candidate
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path!r}: got a path that cannot be looked up ({one_line(error)}); correct it"
        ) from error
    tried = " or ".join(map(str, candidates))
    raise DataError(f"got no file or folder at {tried}; expected {expected}")


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            # Pipes and devices are yielded, to be reported as bad files; broken links are ignored.
            if not name.startswith(".") and path.exists():
                yield path


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({one_line(error)}); check its permissions") from error


def _file_documents(path: Path, name: str) -> Iterator[AnyDocument]:
    records = json_lines if path.name.removesuffix(".gz").endswith(".jsonl") else None
    if path.name.endswith(".parquet"):
        records = parquet_rows
    if records is not None:
        for where, record in records(path):
            yield _document(record, where, f"{name}:{where.rpartition(':')[2]}")
    elif _is_long(path):
        yield LongDocument(name, path)
    else:
        yield Document(name, decode(read_file(path), str(path)))


def _is_long(path: Path) -> bool:
    check_regular(path)
    return path.stat().st_size >= (LONG_BYTES // 4 if path.suffix == ".gz" else LONG_BYTES)


def _checked_documents(path: Path, name: str) -> Iterable[AnyDocument]:
    """The documents of a file without an error; a long file is read twice. Raises DataError."""
    if not _is_long(path):
        return list(_file_documents(path, name))
    with report_reads(None):
        for document in _file_documents(path, name):
            for _ in document.parts():
                pass
    return _file_documents(path, name)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(`path:number`, value) of every non-blank line. Raises DataError for a damaged one."""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if line.strip():
            yield where, parse_json(decode(line, where), where, "one object per line")


def _document(record: Any, where: str, name: str) -> Document:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = f"the fields {sorted(record)}"[:200] if isinstance(record, dict) else type(record).__name__
        raise DataError(f'{where}: got {got}, expected an object with a string "text"; rename the field')
    for field in ("title", "split"):
        if not isinstance(record.get(field), str | None):
            raise DataError(
                f'{where}: got "{field}" of type {type(record[field]).__name__}, expected a string'
            )
    return Document(record.get("title") or name, checked_text(record["text"], where), record.get("split"))


def checked_text(text: str, where: str) -> str:
    """The text unchanged. Raises DataError for a lone surrogate, which cannot be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: got the lone surrogate {text[error.start]!a} at character {error.start}, "
            "expected text that can be encoded in UTF-8; repair it"
        ) from error
    return text
