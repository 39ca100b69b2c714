"""From a source to documents, and from documents to a training and a held-out part.

A source is one of

    stdlib               the running Python's standard library (see standard_library.py)
    FILE.txt[.gz]        one document; any name without a known ending is read like this
    FILE.jsonl[.gz]      one document a line: {"text": ..., "title"?: ..., "split"?: ...}
    FOLDER               every file below it that is not hidden, in sorted order
    hf:NAME[:CONFIG]     a Hugging Face dataset with a `text` column (needs the package `datasets`, and leave to
                         download, see `read_documents`)

Everything is UTF-8, and everything is deterministic: the same files give the same documents in the same
order.
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
MOST_NAMED = 5  # bad files of a folder whose faults an error tells


class Document(NamedTuple):
    name: str
    text: str
    split: str | None = None  # what the record says of itself


class Documents(NamedTuple):
    """What a source holds. Documents without text are left out."""

    documents: tuple[Document, ...]
    # Files left out: of the standard library those that are not UTF-8; of a folder, where asked for, bad ones.
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
      root: folder that a relative path is meant below; default: the current folder, then $BITNET_JAX_DATA.
      skip_bad_files: leave out the files of a folder that cannot be read, with a UserWarning; False: an error that
        names them.
      allow_download: may `hf:` reach the network; None: as $BITNET_JAX_ALLOW_DOWNLOAD says, only if it is 1. A
        config written by somebody else does not decide it.

    Raises:
      DataError: the path is missing, no text is in it, a file is damaged, beyond a limit of files.py or not UTF-8,
        or a download is not allowed.
    """
    skipped: list[str] = []
    if source == "stdlib":
        found = list(_standard_library(skipped))
    elif source.startswith("hf:"):
        allowed = os.environ.get(DOWNLOAD_VARIABLE) == "1" if allow_download is None else allow_download
        if not allowed:
            raise DataError(
                f"source {source!r}: got a data set that is downloaded, expected that to be allowed; pass "
                f"--allow-download (in Python allow_download=True) or set {DOWNLOAD_VARIABLE}=1"
            )
        found = list(_hugging_face(source.removeprefix("hf:")))
    elif (path := resolve_path(source, root)).is_dir():
        found = list(_folder_documents(path, skip_bad_files, skipped))
    else:
        found = list(_file_documents(path, path.name))
    documents = tuple(document for document in found if document.text)
    if not documents:
        raise DataError(
            f"{source}: got no text, expected at least one document that is not empty; check the source"
        )
    return Documents(documents, tuple(skipped))


def resolve_path(path: str, root: str | os.PathLike[str] | None = None) -> Path:
    """The existing absolute path that is meant. Raises DataError with every place looked at."""
    if root is not None:
        places = [Path(root)]
    else:
        outside = os.environ.get(ROOT_VARIABLE)
        places = [Path.cwd()] + ([Path(outside)] if outside else [])
    candidates = list(dict.fromkeys((place / path).absolute() for place in places))
    try:
        for candidate in candidates:
            if candidate.exists():
                return candidate
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path!r}: got a path that cannot be looked up ({one_line(error)}); correct it"
        ) from error
    looked = " or ".join(map(str, candidates))
    raise DataError(
        f"got no file or folder at {looked}; expected an existing path (relative ones are below data.root, "
        f"else the current folder or ${ROOT_VARIABLE}), source stdlib or hf:NAME, tokenizer byte or char; "
        "correct it"
    )


def split_documents(
    documents: Sequence[Document], split: str = "document", valid_fraction: float = 0.05
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Training and held-out documents.

    Args:
      documents: in the order of the source.
      split: `document`: whole documents are held out by a hash of their text, so equal documents fall on one
        side and adding a document moves no other. `tail`: the last characters of the whole text (nanoGPT's
        rule: the first int(N * (1 - fraction)) of N train), cutting a document in two where the border falls
        into it. `record`: as each record's own `split` says: `train`, or one of valid, validation, dev;
        others are left out.
      valid_fraction: share of the documents (`document`, expected) or of the characters (`tail`); not
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
    """A number in [0, 1) from the content alone: the same on every machine and under every Python."""
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _split_tail(
    documents: Sequence[Document], fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    border = int(sum(len(document.text) for document in documents) * (1 - fraction))
    train, valid = [], []
    for document in documents:
        head, tail = document.text[: max(border, 0)], document.text[max(border, 0) :]
        border -= len(document.text)
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
    """Of every file; a bad one is left out and named in `skipped`, or else all of them are named in one error."""
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
    reasons = [reason.removeprefix(f"{folder}/") for reason in bad.values()][:MOST_NAMED]
    more = f", and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    if not skip_bad_files:
        raise DataError(
            f"{folder}: got {len(bad)} bad files among {len(files)}: {' | '.join(reasons)}{more}; mend them or take "
            "them out, or leave them out with data.skip_bad_files=True (--skip-bad-files)"
        )
    skipped += bad
    warnings.warn(
        f"{folder}: left out {len(bad)} bad files of {len(files)}: {' | '.join(reasons)}{more}", stacklevel=3
    )


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            # What is neither a file nor a folder (a pipe, a device) is reported as bad, a broken link as before.
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
    """(`path:number`, value) of every line that is not blank. Raises DataError where one is damaged."""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if line.strip():
            yield where, parse_json(decode(line, where), where, "one object a line")


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
    """The text itself; raises DataError where it has half a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: got the lone surrogate {text[error.start]!a} at character {error.start}, "
            "expected text that UTF-8 can write; repair it"
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
    except Exception as error:  # every backend of that library has errors of its own
        raise DataError(
            f"source 'hf:{name}': could not be loaded ({one_line(error)}); check the name and the network"
        ) from error
    for split in sorted(loaded):
        for number, row in enumerate(loaded[split]):
            where = f"hf:{name} {split}[{number}]"
            if not isinstance(row.get("text"), str):
                raise DataError(f"{where}: got the columns {sorted(row)}, expected a string column `text`")
            yield Document(where, checked_text(row["text"], where), split)
