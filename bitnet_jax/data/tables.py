"""Rows of tables as records: Parquet files, and data sets of the Hugging Face Hub.

A data set is streamed once into a file of JSON lines in the folder `downloads` of the cache (see cache.py), from which
it is read from then on, so that a run resumes on the same text; remove the file to download it again. Without a cache
it is a temporary file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_jax.data.cache import cache_folder
from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.files import check_regular, report_read
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.progress import progress_bar

COLUMNS = ("text", "title", "split")  # of a record; others are not read
ROWS = 256  # in memory at once


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:number`, record) of every row, one row group at a time.

    Raises:
      DataError: not a Parquet file, or a damaged one; the package pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: {missing_package('pyarrow')}") from error
    check_regular(path)
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            number = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{path}:{number}", {k: v for k, v in record.items() if v is not None}
                about = file.metadata.row_group(group)
                report_read(sum(about.column(i).total_compressed_size for i in range(about.num_columns)))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: got a file that pyarrow cannot read ({one_line(error)}), expected a complete Parquet file; copy "
            "it again"
        ) from error


def downloaded(name: str, owner: object) -> Path:
    """The JSON lines of a data set `PATH[:CONFIG]`, downloaded unless they are there.

    Args:
      owner: without a cache, the file is removed with this object.
    Raises:
      DataError: the package datasets is missing, or the data set cannot be loaded or has no column `text`.
    """
    folder = cache_folder()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="bitnet_jax-"))
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    path = folder / "downloads" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".jsonl")
    try:
        with (
            open(descriptor, "w", encoding="utf-8") as file,
            progress_bar(None, unit="document", description=f"downloading {name}", delay=1.0) as progress,
        ):
            for record in _hugging_face(name):
                file.write(json.dumps(record) + "\n")
                progress.update()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def _hugging_face(name: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source 'hf:{name}': {missing_package('datasets')}") from error
    path, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None, streaming=True)
        for split in sorted(loaded):
            for number, row in enumerate(loaded[split]):
                where = f"hf:{name} {split}[{number}]"
                if not isinstance(row.get("text"), str):
                    raise DataError(
                        f"{where}: got the columns {sorted(row)}, expected a string column `text`"
                    )
                yield {"text": row["text"], "title": where, "split": split}
    except DataError:
        raise
    except Exception as error:  # each backend of the library raises its own exceptions
        raise DataError(
            f"source 'hf:{name}': could not be loaded ({one_line(error)}); check the name and the network"
        ) from error
