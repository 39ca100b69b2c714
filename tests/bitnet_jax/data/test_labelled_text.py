"""Labelled texts: reading, splitting, encoding, and invalid input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import DataError, load_labelled_text
from bitnet_jax.data.labelled_text import KEYWORD_EXAMPLES, KEYWORDS, read_examples


def write(path: Path, *rows: object) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def test_two_files_become_two_encoded_splits(tmp_path: Path) -> None:
    rows = [
        {"text": "abc", "label": "x"},
        {"text": "abcdefgh", "label": "y", "fine": 1},
        {"text": "é", "label": "x"},
    ]
    train = write(tmp_path / "train.jsonl.gz", *rows)
    valid = write(tmp_path / "valid.jsonl", {"text": "b", "label": "y"})
    made = load_labelled_text(train, valid_source=valid, length=4)
    assert made.classes == ("x", "y")
    np.testing.assert_array_equal(
        made.train["inputs"], [[97, 98, 99, 0], [97, 98, 99, 100], [195, 169, 0, 0]]
    )
    np.testing.assert_array_equal(made.train["mask"].sum(axis=1), [3, 4, 2])
    np.testing.assert_array_equal(made.train["targets"], [0, 1, 0])
    np.testing.assert_array_equal(made.valid["targets"], [1])
    few = load_labelled_text(train, valid_source=valid, length=4, limit=2)
    assert len(few.train["targets"]) == 2


def test_numeric_labels_keep_their_order_and_a_fraction_is_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "all.jsonl", *[{"text": f"text {i}", "label": i % 3 + 9} for i in range(300)])
    made = load_labelled_text(source, length=8, valid_fraction=0.3)
    assert made.classes == (9, 10, 11)
    assert len(made.train["targets"]) + len(made.valid["targets"]) == 300
    assert 60 < len(made.valid["targets"]) < 120
    again = load_labelled_text(source, length=8, valid_fraction=0.3)
    np.testing.assert_array_equal(made.valid["inputs"], again.valid["inputs"])


def test_keywords_of_the_standard_library() -> None:
    examples = read_examples("keywords")
    assert len(examples) == len(KEYWORDS) * KEYWORD_EXAMPLES
    assert {example.label for example in examples} == set(KEYWORDS)
    made = load_labelled_text("keywords", length=24)
    assert np.bincount(made.valid["targets"], minlength=6).min() > 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r"all.jsonl:1: got no text or no label"),
        ([{"text": "a", "label": 1}, {"sentence": "b", "label": 0}], r"all.jsonl:2: got no text"),
        ([{"text": "", "label": 1}], "got no text"),
        ([{"text": "a", "label": True}], "got no text or no label"),
        ([["a", 1]], "got no text or no label"),
        (
            [{"text": "a", "label": 1}],
            "1 texts to train on and 0 held out|0 texts to train on and 1 held out",
        ),
        (
            [{"text": f"t{i}", "label": "x" if i % 2 else 1} for i in range(40)],
            "both integer and string labels",
        ),
    ],
)
def test_unusable_files_are_rejected(tmp_path: Path, rows: list[object], message: str) -> None:
    source = write(tmp_path / "all.jsonl", *rows)
    with pytest.raises(DataError, match=message):
        load_labelled_text(source, length=4, valid_fraction=0.2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": -5}, "limit: got -5, expected at least 1"),
        ({"limit": 0}, "limit: got 0, expected at least 1"),
        ({"length": 0}, "length: got 0, expected at least 1"),
        ({"valid_fraction": 2.0}, "valid_fraction: got 2.0, expected a number between 0 and 1"),
        ({"valid_fraction": float("nan")}, "valid_fraction: got nan"),
    ],
)
def test_out_of_range_numbers_are_rejected(tmp_path: Path, wrong: dict[str, float], message: str) -> None:
    """A limit of -5 used to silently drop the last five texts."""
    source = write(tmp_path / "all.jsonl", *({"text": f"t{i}", "label": i % 2} for i in range(40)))
    with pytest.raises(DataError, match=message):
        load_labelled_text(source, **{"length": 4} | wrong)  # type: ignore[arg-type]


def test_damaged_files_and_unknown_names_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad.jsonl:1: got damaged JSON"):
        read_examples(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff", "label": 1}')
    with pytest.raises(DataError, match=r"bad.jsonl:1: got byte 0xff at offset 10, expected UTF-8"):
        read_examples(str(tmp_path / "bad.jsonl"))
    (tmp_path / "data.csv").write_text("")
    with pytest.raises(DataError, match=r"expected FILE.jsonl"):
        read_examples(str(tmp_path / "data.csv"))
    train = write(tmp_path / "train.jsonl", {"text": "a", "label": 0})
    valid = write(tmp_path / "valid.jsonl", {"text": "a", "label": 2})
    with pytest.raises(DataError, match=r"held-out labels \['2'\] that no training text has"):
        load_labelled_text(train, valid_source=valid, length=4)


def test_a_test_part_is_held_out_besides_the_valid_part(tmp_path: Path) -> None:
    source = write(tmp_path / "all.jsonl", *({"text": f"text {i}", "label": i % 2} for i in range(200)))
    plain = load_labelled_text(source, length=8, valid_fraction=0.2)
    both = load_labelled_text(source, length=8, valid_fraction=0.2, test=True)
    assert plain.test is None
    assert both.test is not None
    np.testing.assert_array_equal(both.valid["inputs"], plain.valid["inputs"])
    assert len(both.train["targets"]) + len(both.test["targets"]) == len(plain.train["targets"])
    other = write(tmp_path / "other.jsonl", {"text": "b", "label": 0})
    separate = load_labelled_text(source, valid_source=other, length=8, valid_fraction=0.2, test=True)
    assert separate.test is not None
    assert len(separate.test["targets"]) == 1
    np.testing.assert_array_equal(separate.valid["inputs"], plain.valid["inputs"])
