"""Records of an evaluation set: one JSON object per line, with the fields its task requires."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.text import checked_text, json_lines, resolve_path

SHORT = reprlib.Repr()  # a record may be nested too deeply for repr
SHORT.maxstring = SHORT.maxother = 80
STRINGS = list[str]  # field type: a non-empty list of strings


def read_records(
    path: str,
    fields: Mapping[str, Any],
    root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The records of a .jsonl or .jsonl.gz file, restricted to `fields`.

    Args:
      path: resolved by data.text.resolve_path: below root, else the current folder or $BITNET_JAX_DATA.
      fields: name -> type: str, int, STRINGS, or a union of them.
      limit: number of records, spread evenly over the file because files are often sorted.

    Raises:
      DataError: no file, no record, or one that is damaged or lacks a field (the message names the line).
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: got {limit}, expected at least 1 record")
    file = resolve_path(path, root)
    records = [_checked(record, fields, where) for where, record in json_lines(file)]
    if not records:
        raise DataError(f"{file}: got no record, expected one JSON object per line; check the file")
    if limit is not None and limit < len(records):
        records = [records[i] for i in np.arange(limit) * len(records) // limit]
    return records


def _checked(record: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: got {type(record).__name__}, expected an object with {', '.join(fields)}")
    for name, kind in fields.items():
        if not _is_a(record.get(name), kind, where):
            got = SHORT.repr(record[name]) if name in record else f"the fields {sorted(record)}"[:200]
            expected = "a list of strings" if kind == STRINGS else getattr(kind, "__name__", str(kind))
            raise DataError(f'{where}: got {got}, expected "{name}" to be {expected}; correct the record')
    return {name: record[name] for name in fields}


def _is_a(value: Any, kind: Any, where: str) -> bool:
    if kind == STRINGS:
        return isinstance(value, list) and bool(value) and all(_is_a(one, str, where) for one in value)
    if isinstance(value, str):
        checked_text(value, where)
    return isinstance(value, kind) and not isinstance(value, bool)
