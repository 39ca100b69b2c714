"""Token streams built from a config's `data` section."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import (
    ByteTokenizer,
    CharTokenizer,
    DataError,
    Document,
    TokenBatches,
    load_corpus,
    load_tokenizer,
    token_stream,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = {"train": "one two", "valid": "six", "test": "left out"}
    lines = [json.dumps({"text": text, "split": split}) for split, text in texts.items()]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    (tmp_path / "more.txt").write_text("h\u00e9ld")
    return tmp_path


def test_a_stream_has_separators_between_documents_and_at_both_ends() -> None:
    documents = [Document("a", "ab"), Document("b", "c")]
    assert token_stream(documents, ByteTokenizer()).tolist() == [0, 97, 98, 0, 99, 0]
    plain = token_stream(documents, CharTokenizer("abc"))
    assert plain.tolist() == [0, 1, 2]
    assert plain.dtype == np.int32
    with pytest.raises(DataError, match="b: got the character 'c' at 0"):
        token_stream(documents, CharTokenizer("ab"))


def test_splits_and_their_sizes(folder: Path) -> None:
    corpus = load_corpus("records.jsonl", split="record", root=folder)
    assert ByteTokenizer().decode(corpus.train) == "\0one two\0"
    assert ByteTokenizer().decode(corpus.valid) == "\0six\0"
    assert corpus.summary() == {
        "tokenizer": "byte",
        "vocab_size": 256,
        "train_documents": 1,
        "valid_documents": 1,
        "train_bytes": 7,
        "valid_bytes": 3,
        "train_tokens": 9,
        "valid_tokens": 5,
        "skipped_files": 0,
    }
    assert corpus.valid_token_bytes.tolist() == [0, 1, 1, 1, 0]


def test_a_separate_held_out_source(folder: Path) -> None:
    corpus = load_corpus("records.jsonl", valid_source="more.txt", tokenizer="char", root=folder)
    assert (corpus.train_documents, corpus.valid_documents, corpus.valid_bytes) == (3, 1, 5)
    assert corpus.tokenizer.decode(corpus.valid) == "\0h\u00e9ld\0"
    assert corpus.tokenizer.decode(corpus.train) == "\0one two\0six\0left out\0"


def test_a_single_document_needs_no_separator(folder: Path) -> None:
    corpus = load_corpus("more.txt", split="tail", valid_fraction=0.5, tokenizer="char", root=folder)
    assert (corpus.tokenizer.vocab_size, corpus.tokenizer.eos_id) == (4, None)
    assert corpus.train.tolist() == [1, 3]
    assert corpus.valid.tolist() == [2, 0]


def test_tokenizers_are_given_by_name_path_or_value(folder: Path) -> None:
    (folder / "t.json").write_text(CharTokenizer("\0xéhld", separator="\0").to_json())
    corpus = load_corpus("more.txt", split="tail", valid_fraction=0.5, tokenizer="t.json", root=folder)
    assert corpus.train.tolist() == [0, 3, 2, 0]
    given = load_corpus("more.txt", split="tail", valid_fraction=0.5, tokenizer=corpus.tokenizer, root=folder)
    assert given.tokenizer is corpus.tokenizer
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    for content in (b"{", b"\xff", b'{"kind": "char"}'):
        (folder / "t.json").write_bytes(content)
        with pytest.raises(DataError, match="t.json: "):
            load_tokenizer("t.json", root=folder)
    with pytest.raises(DataError, match="byte or char"):
        load_tokenizer("bytes", root=folder)
    with pytest.raises(DataError, match="symbols: got 0"):
        load_tokenizer("char")


def test_the_default_corpus_trains() -> None:
    corpus = load_corpus()
    assert corpus.tokenizer.kind == "byte"
    assert corpus.train_bytes > 5_000_000
    # 5 % of about 700 documents, whose sizes differ by a factor of thousands
    assert 0.01 < corpus.valid_bytes / corpus.train_bytes < 0.15
    assert np.count_nonzero(corpus.train) == corpus.train_bytes  # no zero byte except the separators
    assert len(corpus.train) == corpus.train_bytes + corpus.train_documents + 1
    again = load_corpus()
    np.testing.assert_array_equal(again.train, corpus.train)
    batch = TokenBatches(corpus.train, 128, 16).batch(0)
    assert len({row.tobytes() for row in batch["inputs"]}) > 12  # not the same text sixteen times


def test_real_corpora(data_root: Path) -> None:
    books = load_corpus("lm/gutenberg17.jsonl.gz", split="record", root=data_root)
    assert (books.train_documents, books.valid_documents) == (12, 2)
    shakespeare = load_corpus(
        "lm/tinyshakespeare.txt.gz", tokenizer="char", split="tail", valid_fraction=0.1, root=data_root
    )
    assert shakespeare.tokenizer.vocab_size == 65
    assert (len(shakespeare.train), len(shakespeare.valid)) == (1_003_854, 111_540)
