"""Token streams built from a config's `data` section."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import (
    ByteTokenizer,
    CharTokenizer,
    DataError,
    Document,
    TokenBatches,
    files,
    load_corpus,
    load_stream,
    load_tokenizer,
    read_documents,
    text,
    token_stream,
)
from bitnet_jax.data import corpus as corpora
from bitnet_jax.data.bpe import train_bpe
from bitnet_jax.data.documents import Split


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


# ---- on disk


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every corpus goes through the cache, and every file is read in small parts."""
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "LARGE_BYTES", 0)
    monkeypatch.setattr(corpora, "SLOW_BYTES", 0)
    monkeypatch.setattr(text, "LONG_BYTES", 64)
    monkeypatch.setattr(files, "BLOCK", 50)
    return tmp_path / "cache"


def write_texts(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"Document {i}: " + "caf\u00e9 \u4e2d\u6587 " * (i % 7 + 1))
    records = [{"text": f"record {i}", "split": ("train", "valid", "other")[i % 3]} for i in range(9)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


SETTINGS: list[dict[str, object]] = [
    {"valid_fraction": 0.3},
    {"split": "tail", "valid_fraction": 0.37},
    {"split": "record"},
    {"valid_source": "other.txt", "tokenizer": "char"},
    {"split": "tail", "valid_fraction": 0.5, "tokenizer": "char"},
    {"valid_fraction": 0.3, "tokenizer": "tokenizer.json"},
    {"split": "tail", "valid_fraction": 0.01, "tokenizer": "tokenizer.json"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_corpus_on_disk_equals_the_one_in_memory(
    settings: dict[str, object], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "other.txt").write_text("held out \u4e2d")
    if settings.get("tokenizer") == "tokenizer.json":
        pytest.importorskip("tokenizers", reason="the tokenizers library is an extra")
        trained = train_bpe(read_documents("texts", tmp_path).documents, 280)
        (tmp_path / "tokenizer.json").write_text(trained.to_json())
    memory = load_corpus("texts", root=tmp_path, **settings)  # type: ignore[arg-type]
    folder = request.getfixturevalue("on_disk")
    for _ in range(2):
        disk = load_corpus("texts", root=tmp_path, **settings)  # type: ignore[arg-type]
        for name in ("train", "valid", "valid_token_bytes"):
            np.testing.assert_array_equal(getattr(disk, name), getattr(memory, name))
        assert disk.summary() == memory.summary()
        assert disk.tokenizer.to_json() == memory.tokenizer.to_json()
        assert disk.fingerprint == memory.fingerprint == zlib.crc32(memory.train.tobytes())
        assert disk.train.dtype == (np.uint8 if memory.tokenizer.vocab_size <= 256 else np.uint16)
    assert len(list(folder.glob("*.entry"))) == 1


def test_a_corpus_is_tokenized_once_per_content_tokenizer_and_split(
    tmp_path: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "texts")
    first = load_corpus(str(texts), valid_fraction=0.3)
    load_stream(str(texts), ByteTokenizer())
    shutil.copytree(texts, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "stream_blocks", None)
        patch.setattr(Split, "of", None)
        again = load_corpus(str(tmp_path / "copy"), valid_fraction=0.3)
        np.testing.assert_array_equal(again.train, first.train)
        assert load_stream(str(texts), ByteTokenizer()).tokens[0] == 0
        for settings in (
            {"valid_fraction": 0.31},
            {"split": "tail", "valid_fraction": 0.3},
            {"tokenizer": "char"},
        ):
            with pytest.raises(TypeError, match="NoneType"):
                load_corpus(str(texts), **({"valid_fraction": 0.3} | settings))  # type: ignore[arg-type]
        (texts / "000.txt").write_text("Document 0, changed")
        with pytest.raises(TypeError, match="NoneType"):
            load_corpus(str(texts), valid_fraction=0.3)
    assert len(list(on_disk.glob("*.entry"))) == 2


def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, of = write_texts(tmp_path / "texts"), Split.of

    def meanwhile(*args: object) -> Split:
        made = of(*args)  # type: ignore[arg-type]
        (texts / "000.txt").write_text("x" * 500)
        return made

    monkeypatch.setattr(Split, "of", meanwhile)
    with pytest.raises(DataError, match="000.txt: it changed while it was read; start again"):
        load_corpus(str(texts), valid_fraction=0.3)
    assert not list(on_disk.glob("*.entry"))


def test_bad_files_are_skipped_and_listed_from_the_cache_too(tmp_path: Path, on_disk: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    (texts / "005.txt").write_bytes(b"\xff" * 10)
    (texts / "041.txt").write_bytes("long and cut: \u4e2d".encode()[:-1] + b"x" * 100)  # read in parts
    (texts / "042.jsonl").write_text('{"text": "not this either"}\n' * 5 + "{")
    with pytest.raises(
        DataError, match="got 3 bad files among 43: 005.txt: .*041.txt: .*042.jsonl:6: got damaged"
    ):
        load_corpus(str(texts), valid_fraction=0.3)
    with pytest.warns(UserWarning, match="skipped 3 bad files of 43"):
        first = load_corpus(str(texts), valid_fraction=0.3, skip_bad_files=True)
    again = load_corpus(str(texts), valid_fraction=0.3, skip_bad_files=True)
    assert first.skipped == again.skipped == ("005.txt", "041.txt", "042.jsonl")
    assert again.summary()["skipped"] == [*first.skipped]
    assert b"not this" not in bytes(first.train)
    assert b"not this" not in bytes(first.valid)


@pytest.mark.parametrize("split", ["tail", "document", "record"])
def test_a_test_part_is_held_out_besides_the_valid_part(folder: Path, split: str) -> None:
    lines = [json.dumps({"text": f"{i:02d}" * 5, "split": "train"}) for i in range(60)]
    lines += [json.dumps({"text": name, "split": name}) for name in ("valid", "test")]
    (folder / "many.jsonl").write_text("\n".join(lines))
    how = {"split": split, "valid_fraction": 0.2, "root": folder}
    both, without = (load_corpus("many.jsonl", test=test, **how) for test in (True, False))  # type: ignore[arg-type]
    assert both.test is not None
    assert without.test is None
    assert "test_tokens" not in without.summary()
    assert both.summary()["test_bytes"] == both.test.token_bytes.sum() == both.test_bytes > 0
    parts = {"train": both.train, "valid": both.valid, "test": both.test.tokens}
    text = {name: ByteTokenizer().decode(part).replace("\0", "") for name, part in parts.items()}
    whole = tuple(ByteTokenizer().decode(part).replace("\0", "") for part in (without.train, without.valid))
    if split == "tail":
        assert text["train"] + text["valid"] + text["test"] == "".join(whole)
        assert text["test"] == whole[1]
        assert abs(len(text["valid"]) - len(text["test"])) <= 1
    elif split == "document":
        assert text["valid"] == whole[1], "the valid documents are the same ones"
        assert len(text["train"]) + len(text["test"]) == len(whole[0])
    else:
        assert (text["train"], text["valid"], text["test"]) == (*whole, "test")


def test_with_a_test_part_a_separate_source_is_the_test(folder: Path) -> None:
    both = load_corpus(
        "more.txt", valid_source="records.jsonl", split="tail", valid_fraction=0.5, test=True, root=folder
    )
    assert both.test is not None
    assert ByteTokenizer().decode(both.test.tokens) == "\0one two\0six\0left out\0"
    assert ByteTokenizer().decode(both.train) + ByteTokenizer().decode(both.valid) == "\0h\u00e9\0\0ld\0"
    with pytest.raises(DataError, match=r"valid_fraction: got 0.5 with data.test, .* expected less than 0.5"):
        load_corpus("more.txt", split="tail", valid_fraction=0.5, test=True, root=folder)
    (folder / "two.jsonl").write_text((folder / "records.jsonl").read_text().rpartition("\n")[0])
    with pytest.raises(DataError, match="got 1 to train on and 1 and 0 held out"):
        load_corpus("two.jsonl", split="record", test=True, root=folder)
