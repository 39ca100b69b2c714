"""Reading documents from a source, and splitting them into a training and a held-out part.

A source is one of

    stdlib               the running Python's standard library (see standard_library.py)
    FILE.txt[.gz]        one document; also any file with an unknown extension
    FILE.jsonl[.gz]      one document per line: {"text": ..., "title"?: ..., "split"?: ...}
    FOLDER               every non-hidden file below it, in sorted order
    hf:NAME[:CONFIG]     a Hugging Face dataset with a `text` column (needs the package `datasets`, and permission
                         to download, see `read_documents`)

All text is UTF-8. Reading is deterministic: the same files give the same documents in the same order.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_jax.data import standard_library
from bitnet_jax.data.errors import DataError, check_share, one_line
from bitnet_jax.data.files import decode, parse_json, read_file, read_lines
from bitnet_jax.optional_packages import missing_package

ROOT_VARIABLE = "BITNET_JAX_DATA"
SPLITS = ("document", "tail", "record")
HELD_OUT_NAMES = ("valid", "validation", "dev")
DOWNLOAD_VARIABLE = "BITNET_JAX_ALLOW_DOWNLOAD"
MAX_LISTED = 5  # bad files of a folder that an error describes


class Document(NamedTuple):
    name: str
    text: str
    split: str | None = None  # the record's own `split` field


class Documents(NamedTuple):
    """The non-empty documents of a source."""

    documents: tuple[Document, ...]
    # Skipped files: in the standard library those that are not UTF-8; in a folder bad ones, with skip_bad_files.
    skipped: tuple[str, ...] = ()


def text_bytes(documents: Sequence[Document]) -> int:
    """Bytes of the documents' text in UTF-8."""
    return sum(len(document.text.encode()) for document in documents)


def read_documents(
    source: str,
    root: str | os.PathLike[str] | None = None,
    *,
    skip_bad_files: bool = False,
    allow_download: bool | None = None,
) -> Documents:
    """All documents of a source (see the module docstring).

    Args:
      source: what to read.
      root: base folder of a relative path; default: the current folder, then $BITNET_JAX_DATA.
      skip_bad_files: skip unreadable files of a folder with a UserWarning; False: raise an error that names them.
      allow_download: whether `hf:` may use the network; None: only if $BITNET_JAX_ALLOW_DOWNLOAD is 1. Not a config
        setting, since configs may come from third parties.

    Raises:
      DataError: the path is missing or holds no text, a file is damaged, beyond a limit of files.py or not UTF-8, or
        the download is not allowed.
    """
    skipped: list[str] = []
    if source == "stdlib":
        found = list(_standard_library(skipped))
    elif source.startswith("hf:"):
        allowed = os.environ.get(DOWNLOAD_VARIABLE) == "1" if allow_download is None else allow_download
        if not allowed:
            raise DataError(
                f"source {source!r}: got a data set that must be downloaded, expected permission to download; pass "
                f"--allow-download (in Python allow_download=True) or set {DOWNLOAD_VARIABLE}=1"
            )
        found = list(_hugging_face(source.removeprefix("hf:")))
    elif (path := resolve_path(source, root)).is_dir():
        found = list(_folder_documents(path, skip_bad_files, skipped))
    else:
        found = list(_file_documents(path, path.name))
    documents = tuple(document for document in found if document.text)
    if not documents:
        raise DataError(f"{source}: got no text, expected at least one non-empty document; check the source")
    return Documents(documents, tuple(skipped))


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
    if split not in SPLITS:
        raise DataError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}; correct data.split")
    if split != "record":
        check_share("valid_fraction", valid_fraction)
    if split == "document":
        held_out = [unit_hash(document.text) < valid_fraction for document in documents]
        train = tuple(d for d, out in zip(documents, held_out, strict=True) if not out)
        valid = tuple(d for d, out in zip(documents, held_out, strict=True) if out)
    elif split == "tail":
        train, valid = _split_tail(documents, valid_fraction)
    else:
        train = tuple(d for d in documents if d.split == "train")
        valid = tuple(d for d in documents if d.split in HELD_OUT_NAMES)
    if not train or not valid:
        advice = {
            "document": "use data.split=tail, or another data.valid_fraction",
            "tail": "use more text, or another data.valid_fraction",
            "record": "give each record a field split (train, valid), or use data.split=document or tail",
        }[split]
        raise DataError(
            f"split {split!r} of {len(documents)} documents: got {len(train)} to train on and {len(valid)} "
            f"held out, expected at least one each; {advice}"
        )
    return train, valid


def unit_hash(text: str) -> float:
    """A hash of the text in [0, 1), the same on every machine and Python version."""
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _split_tail(
    documents: Sequence[Document], fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    boundary = int(sum(len(document.text) for document in documents) * (1 - fraction))
    train, valid = [], []
    for document in documents:
        head, tail = document.text[: max(boundary, 0)], document.text[max(boundary, 0) :]
        boundary -= len(document.text)
        if head:
            train.append(document._replace(text=head))
        if tail:
            valid.append(document._replace(text=tail))
    return tuple(train), tuple(valid)


def _standard_library(skipped: list[str]) -> Iterator[Document]:
    root = standard_library.folder()
    for path in standard_library.source_files(root):
        name = path.relative_to(root).as_posix()
        try:
            yield Document(name, read_file(path).decode())
        except UnicodeDecodeError:  # a few files declare another encoding on purpose
            skipped.append(name)


def _folder_documents(folder: Path, skip_bad_files: bool, skipped: list[str]) -> Iterator[Document]:
    """The documents of every file. Bad files are added to `skipped`, or else reported in one error."""
    bad: dict[str, str] = {}
    files = list(_files_below(folder))
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            documents = list(_file_documents(path, name))
        except DataError as error:
            bad[name] = str(error)
        else:
            yield from documents
    if not bad:
        return
    reasons = [reason.removeprefix(f"{folder}/") for reason in bad.values()][:MAX_LISTED]
    more = f", and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
    if not skip_bad_files:
        raise DataError(
            f"{folder}: got {len(bad)} bad files among {len(files)}: {' | '.join(reasons)}{more}; repair or remove "
            "them, or skip them with data.skip_bad_files=True (--skip-bad-files)"
        )
    skipped += bad
    warnings.warn(
        f"{folder}: skipped {len(bad)} bad files of {len(files)}: {' | '.join(reasons)}{more}", stacklevel=3
    )


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


def _file_documents(path: Path, name: str) -> Iterator[Document]:
    if name.removesuffix(".gz").endswith(".jsonl"):
        for where, record in json_lines(path):
            yield _document(record, where, f"{name}:{where.rpartition(':')[2]}")
    else:
        yield Document(name, decode(read_file(path), str(path)))


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


def _hugging_face(name: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source 'hf:{name}': {missing_package('datasets')}") from error
    path, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None)
    except Exception as error:  # each backend of the library raises its own exceptions
        raise DataError(
            f"source 'hf:{name}': could not be loaded ({one_line(error)}); check the name and the network"
        ) from error
    for split in sorted(loaded):
        for number, row in enumerate(loaded[split]):
            where = f"hf:{name} {split}[{number}]"
            if not isinstance(row.get("text"), str):
                raise DataError(f"{where}: got the columns {sorted(row)}, expected a string column `text`")
            yield Document(where, checked_text(row["text"], where), split)
