"""Sentences: distinct lines, their parts, and the tokens around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.sentences import load_sentences
from bitnet_jax.data.tokenizers import ByteTokenizer


def load(folder: Path, lines: list[str], **changes: Any) -> Any:
    (folder / "lines.txt").write_text("\n".join(lines))
    return load_sentences(
        str(folder / "lines.txt"), ByteTokenizer(), **{"length": 6, "valid_fraction": 0.3} | changes
    )


def test_lines_are_cut_and_padded_with_the_tokens_around_them(tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("xyz\n")
    parts = load(
        tmp_path,
        ["abcdefgh", " ab ", "", "ab"],
        begin=[1],
        end=[2],
        valid_source=str(tmp_path / "held_out.txt"),
    )
    np.testing.assert_array_equal(parts.train["inputs"], [[1, *b"abcd", 2], [1, *b"ab", 2, 0, 0]])
    np.testing.assert_array_equal(parts.train["mask"], [[True] * 6, [True] * 4 + [False] * 2])
    np.testing.assert_array_equal(parts.valid["inputs"], [[1, *b"xyz", 2, 0]])
    assert parts.test is None


def test_every_distinct_line_is_in_one_part(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(100)]
    parts = load(tmp_path, lines * 2, length=9, test=True)
    rows = [
        bytes(row[mask].astype(np.uint8)).decode()
        for part in parts
        for row, mask in zip(*part.values(), strict=True)
    ]
    assert sorted(rows) == sorted(lines)
    assert min(len(part["inputs"]) for part in parts) > 10
    assert len(load(tmp_path, lines, length=9, limit=7).train["inputs"]) == 7


def test_too_little_text_or_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="got 1 and 0 texts to train on and held out, expected at least one each"
    ):
        load(tmp_path, ["the only line"], valid_fraction=0.01)
    with pytest.raises(DataError, match="length: got 2, expected more than the 2 begin and end tokens"):
        load(tmp_path, ["ab", "cd"], length=2, begin=[1], end=[2])
