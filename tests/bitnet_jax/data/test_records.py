"""Records with the fields that a task requires, and every way those fields can be missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bitnet_jax.data import DataError
from bitnet_jax.data.records import STRINGS, read_records

FIELDS = {"question": str, "choices": STRINGS, "label": int}


def write(path: Path, *records: object) -> Path:
    text = "\n".join(json.dumps(record) for record in records) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_records_keep_the_named_fields(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"question": "?", "choices": ["a", "b"], "label": 1}
    write(tmp_path / name, record | {"source": "x"}, record)
    assert read_records(name, FIELDS, tmp_path) == [record, record]
    monkeypatch.setenv("BITNET_JAX_DATA", str(tmp_path))
    assert len(read_records(name, FIELDS)) == 2


def test_a_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *({"n": i} for i in range(10)))
    for limit, expected in ((3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))):
        assert [r["n"] for r in read_records("a.jsonl", {"n": int}, tmp_path, limit)] == expected
    with pytest.raises(DataError, match="limit: got 0"):
        read_records("a.jsonl", {"n": int}, tmp_path, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "a.jsonl:2: got list, expected an object with question, choices, label"),
        (
            '{"question": "?", "choices": ["a"]}',
            r"got the fields \['choices', 'question'\], expected \"label\"",
        ),
        ('{"question": 5, "choices": ["a"], "label": 0}', 'got 5, expected "question" to be str'),
        (
            '{"question": "?", "choices": [], "label": 0}',
            r'got \[\], expected "choices" to be a list of strings',
        ),
        ('{"question": "?", "choices": ["a", 2], "label": 0}', "to be a list of strings"),
        ('{"question": "?", "choices": ["a"], "label": true}', 'got True, expected "label" to be int'),
        ('{"question": "\\ud800", "choices": ["a"], "label": 0}', "lone surrogate"),
        ('{"question": ', "damaged JSON"),
        ('{"a": ' + "9" * 5000 + "}", "JSON that cannot be read"),
        ("[" * 100_000, "damaged JSON"),
        ("\xff", "expected UTF-8"),
    ],
)
def test_the_error_names_the_damaged_line(line: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "?", "choices": ["a"], "label": 0})
    file.write_bytes(file.read_bytes().rstrip() + b"\n" + line.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_records("a.jsonl", FIELDS, tmp_path)


def test_missing_file_and_empty_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no file or folder at"):
        read_records("a.jsonl", FIELDS, tmp_path)
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="got no record"):
        read_records("a.jsonl", FIELDS, tmp_path)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(DataError, match="damaged gzip data"):
        read_records("b.jsonl.gz", FIELDS, tmp_path)
