"""Text sources, splits, and a one-line error for every kind of invalid file."""

from __future__ import annotations

import gzip
import json
import os
import sys
import sysconfig
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax.data import (
    DataError,
    Document,
    Source,
    read_documents,
    resolve_path,
    split_documents,
    standard_library,
)
from bitnet_jax.data.documents import text_bytes


def one_line_error(source: str | Path, **kwargs: object) -> str:
    with pytest.raises(DataError) as caught:
        read_documents(str(source), **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_records(path: Path, *records: object) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# ---- the standard library


def test_stdlib_is_the_sorted_sources_without_tests_and_site_packages() -> None:
    documents, skipped = read_documents("stdlib")
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    for name in names:
        parents = set(name.split("/")[:-1])
        assert not parents & {"site-packages", "test", "tests", "idle_test", "__pycache__"}, name
        assert not name.startswith("_sysconfigdata")
    assert text_bytes(documents) > 5_000_000
    assert len(skipped) < 10
    root = Path(sysconfig.get_paths()["stdlib"])
    assert documents[names.index("argparse.py")].text.encode() == (root / "argparse.py").read_bytes()


def test_stdlib_skips_files_that_are_not_utf8_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.py").write_bytes(b"# latin \xe9")
    (tmp_path / "a.py").write_text("pass\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "notes.txt").write_text("not source")
    for left_out in ("test", "site-packages", "config-3.11-x86_64"):
        (tmp_path / left_out).mkdir()
        (tmp_path / left_out / "c.py").write_text("pass")
    monkeypatch.setattr(standard_library, "folder", lambda: tmp_path)
    documents, skipped = read_documents("stdlib")
    assert [document.name for document in documents] == ["a.py"]
    assert skipped == ("b.py",)


# ---- files and folders


def test_text_is_read_byte_for_byte(tmp_path: Path) -> None:
    content = "line\r\nno end: é \u2028 \U0001f600 \x0c"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.txt", "b.txt.gz"):
        assert read_documents(str(tmp_path / name)).documents == (Document(name, content),)


def test_records_keep_their_title_and_split(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write_records(
            tmp_path / name,
            {"text": "one", "title": "T", "split": "valid"},
            {"text": ""},
            {"text": "two", "id": 7},
        )
        assert read_documents(str(path)).documents == (
            Document("T", "one", "valid"),
            Document(f"{name}:3", "two"),
        )


def test_a_folder_is_read_as_its_visible_files_in_order(tmp_path: Path) -> None:
    for folder in (
        "z",
        ".git",
        "k",
        "y",
        "j",
        "x",
        "i",
    ):  # created out of order, so that a sorted listing is no coincidence
        (tmp_path / folder).mkdir()
    for folder in "kyjxi":
        (tmp_path / folder / "f").write_text(folder)
    for name, text in (("z/a.md", "1"), ("b.txt", "2"), ("A.py", "3"), (".hidden", "x"), (".git/c", "x")):
        (tmp_path / name).write_text(text)
    write_records(tmp_path / "r.jsonl", {"text": "4"})
    assert [d.text for d in read_documents(str(tmp_path)).documents] == [*"324", *"ijkxy", "1"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, outside, root = (tmp_path / name for name in ("here", "outside", "root"))
    for folder in (here, outside, root):
        folder.mkdir()
        (folder / "both").write_text(folder.name)
    (outside / "only").write_text("x")
    monkeypatch.chdir(here)
    monkeypatch.setenv("BITNET_JAX_DATA", str(outside))
    assert resolve_path("both") == here / "both"
    assert resolve_path("only") == outside / "only"
    assert resolve_path("both", root) == root / "both"
    assert resolve_path(str(outside / "both"), root) == outside / "both"
    assert str(root / "only") in one_line_error("only", root=root)
    message = one_line_error("nowhere")
    assert str(here / "nowhere") in message
    assert str(outside / "nowhere") in message


# ---- bad input


def test_empty_files_and_folders_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for source in (tmp_path / "empty.txt", tmp_path):
        message = one_line_error(source)
        assert str(source) in message
        assert "non-empty" in message


def test_the_error_for_a_wrong_encoding_names_file_byte_and_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 noir".encode("latin-1"))
    message = one_line_error(tmp_path / "latin.txt")
    assert f"{tmp_path / 'latin.txt'}: got byte 0xe9 at offset 3" in message
    assert "UTF-8" in message


def test_a_path_that_is_neither_file_nor_folder_is_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "got a pipe, expected a regular file" in one_line_error(tmp_path / "pipe")
    assert "got a device, expected a regular file" in one_line_error("/dev/zero")
    (tmp_path / "text.txt").write_text(
        "text"
    )  # a folder with a pipe in it, which used to be silently ignored
    assert "got 1 bad files among 2: pipe: got a pipe" in one_line_error(tmp_path)


def test_paths_rejected_by_the_system() -> None:
    assert "cannot be looked up" in one_line_error("x" * 5000)
    one_line_error("nul\0byte")


def test_unreadable_files_and_folders_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call is mocked: root, which often runs the tests, may read everything."""

    def refuse(path: object, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    assert f"{tmp_path / 'file'}: cannot be read" in one_line_error(tmp_path / "file")
    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path}: cannot be read" in one_line_error(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a"', "damaged JSON"),
        (b'{"body": "a"}', "the fields ['body']"),
        (b'{"text": 3}', 'string "text"'),
        (b'["text"]', "got list"),
        (b'{"text": "a", "title": 1}', '"title" of type int'),
        (b'{"text": "\xff"}', "byte 0xff at offset 10"),
        (b'{"text": "\\ud800"}', "lone surrogate '\\ud800' at character 0"),
        (b"[" * 100_000, "damaged JSON"),
        (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
    ],
)
def test_the_error_for_a_damaged_record_names_file_and_line(
    tmp_path: Path, line: bytes, expected: str
) -> None:
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n\n' + line + b"\n"))
    message = one_line_error(path)
    assert f"{path}:3: got" in message
    assert expected in message


def test_the_error_for_damaged_gzip_names_file_and_position(tmp_path: Path) -> None:
    content = b"".join(b'{"text": "%d"}\n' % (i * 7919 % 10007) for i in range(3000))
    packed = gzip.compress(content)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    cases = {
        "no_gzip.jsonl.gz": content,
        "truncated.txt.gz": packed[: len(packed) // 2],
        "flipped.jsonl.gz": bytes(flipped),
        "checksum.jsonl.gz": packed[:-8] + bytes(8),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        message = one_line_error(tmp_path / name)
        assert f"{tmp_path / name}:" in message
        assert "got damaged" in message
    assert "after 0 unpacked bytes" in one_line_error(tmp_path / "no_gzip.jsonl.gz")
    assert f"after {len(content)} unpacked bytes" in one_line_error(tmp_path / "checksum.jsonl.gz")


VALID_RECORDS = gzip.compress(b'{"text": "a"}\n{"text": "b", "title": "t", "split": "train"}\n' * 5)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_fuzzed_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random bytes, JSON lines of random values, and small damages to a good file."""
    how = data.draw(st.sampled_from(["bytes", "gzip", "json", "damage"]))
    content = data.draw(st.binary(max_size=200))
    if how == "gzip":
        content = gzip.compress(content)
    elif how == "json":
        leaf = st.none() | st.integers() | st.text()
        fields = st.dictionaries(st.sampled_from(["text", "title", "split", "id"]), leaf)
        content = gzip.compress(json.dumps(data.draw(fields)).encode())
    elif how == "damage":
        damaged = bytearray(VALID_RECORDS)
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(damaged)
    path = tmp_path_factory.getbasetemp() / data.draw(
        st.sampled_from(["f.jsonl.gz", "f.txt.gz", "f.jsonl", "f.txt"])
    )
    path.write_bytes(content)
    try:
        result: object = read_documents(str(path))
    except DataError as error:
        result = error
    if isinstance(result, DataError):
        assert "\n" not in str(result)
    else:
        assert all(document.text for document in result.documents)


def test_all_bad_files_of_a_folder_are_named_and_skipped_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "one"}\n{')
    message = one_line_error(tmp_path)
    assert "got 2 bad files among 3: b.txt: got byte 0xe9 at offset 3" in message
    assert "deep/c.jsonl:2: got damaged JSON" in message
    assert "data.skip_bad_files=True (--skip-bad-files)" in message
    with pytest.warns(UserWarning, match=r"skipped 2 bad files of 3: b.txt: .*deep/c.jsonl:2") as warned:
        documents, skipped = read_documents(str(tmp_path), skip_bad_files=True)
    assert len(warned) == 1
    assert [document.name for document in documents] == [
        "a.txt"
    ]  # nothing from a file that is partly invalid
    assert skipped == ("b.txt", "deep/c.jsonl")
    for number in range(20):
        (tmp_path / f"bad{number}.txt").write_bytes(b"\xff")
    message = one_line_error(tmp_path)
    assert "got 22 bad files among 23" in message
    assert ", and 17 more; " in message
    assert len(message) < 2000


# ---- Hugging Face


def test_hugging_face_without_the_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = one_line_error("hf:roneneldan/TinyStories", allow_download=True)
    assert "roneneldan/TinyStories" in message
    assert "pip install datasets" in message


def test_hugging_face_splits_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, streaming: bool) -> dict[str, list[dict[str, object]]]:
        assert streaming
        asked.append((path, name))
        if path == "offline":
            raise ConnectionError("no route to host\nmore")
        column = "body" if path == "other" else "text"
        return {"validation": [{column: "held out"}], "train": [{column: "one"}, {column: "two"}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for allowed in (None, False):
        assert "--allow-download" in one_line_error("hf:org/name", allow_download=allowed)
    monkeypatch.setenv("BITNET_JAX_ALLOW_DOWNLOAD", "1")
    assert "--allow-download" in one_line_error("hf:org/name", allow_download=False)
    assert asked == []  # nothing was looked up
    documents = read_documents("hf:org/name:config").documents
    assert asked == [("org/name", "config")]
    assert [d.text for d in documents] == ["one", "two", "held out"]
    train, valid = split_documents(documents, "record")
    assert ([d.text for d in train], [d.text for d in valid]) == (["one", "two"], ["held out"])
    assert "no route to host" in one_line_error("hf:offline")
    assert "'body'" in one_line_error("hf:other")
    # With a cache, it is downloaded once, and half a data set is not kept.
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path))
    del asked[:]
    for _ in range(2):
        assert read_documents("hf:org/name:config").documents == documents
        one_line_error("hf:other")
    assert asked == [("org/name", "config"), ("other", None), ("other", None)]
    assert len(list((tmp_path / "downloads").iterdir())) == 1


# ---- Parquet


def test_rows_of_parquet_files_are_documents(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet, table

    rows = {
        "text": [f"text {i}" for i in range(1000)],
        "split": ["train", None] * 500,
        "other": [*range(1000)],
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(table(rows), path, row_group_size=300)
    (tmp_path / "b.txt").write_text("b")
    source = Source(str(tmp_path))
    for _ in range(2):
        documents = list(source)
        assert [d.text for d in documents] == [*rows["text"], "b"]
        assert documents[:2] == [
            Document("a.parquet:1", "text 0", "train"),
            Document("a.parquet:2", "text 1"),
        ]
    assert read_documents(str(path)).documents == tuple(documents[:-1])
    content = path.read_bytes()
    for damaged in (b"", content[:-20], content[:200] + b"\xff" * 400 + content[600:], b"text"):
        path.write_bytes(damaged)
        assert "a.parquet: got a file that pyarrow cannot read" in one_line_error(path)
    parquet.write_table(table({"body": ["x"]}), path)
    assert 'expected an object with a string "text"' in one_line_error(path)


def test_parquet_without_the_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in one_line_error(tmp_path / "a.parquet")


# ---- splits


def some_documents(count: int) -> list[Document]:
    return [Document(f"d{i}", f"text {i}\n" * (1 + i % 7)) for i in range(count)]


def test_the_document_split_depends_only_on_content() -> None:
    documents = some_documents(2000)
    train, valid = split_documents(documents, "document", 0.05)
    assert sorted(train + valid) == sorted(documents)
    # 2000 draws with probability 0.05: mean 100, standard deviation 9.7; the tolerance is 4 of them
    assert 61 <= len(valid) <= 139
    renamed = [document._replace(name="other") for document in reversed(documents)]
    assert {d.text for d in split_documents(renamed, "document", 0.05)[1]} == {d.text for d in valid}
    # adding documents moves none, and a larger fraction holds out a superset of a smaller one
    assert set(split_documents(documents[:500], "document", 0.05)[1]) == set(valid) & set(documents[:500])
    assert set(valid) <= set(split_documents(documents, "document", 0.1)[1])
    # pinned: the rule may not change between machines, Python versions or versions of the code
    assert [d.name for d in valid[:4]] == ["d5", "d55", "d61", "d76"]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_the_tail_split_keeps_every_character_in_order(texts: list[str], fraction: float) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    whole = "".join(texts)
    border = int(len(whole) * (1 - fraction))
    try:
        train, valid = split_documents(documents, "tail", fraction)
    except DataError:
        assert border == 0
        return
    assert "".join(d.text for d in train) == whole[:border]
    assert "".join(d.text for d in valid) == whole[border:]
    assert all(d.text for d in train + valid)


def test_the_record_split_ignores_other_splits() -> None:
    documents = [Document(s, s, s) for s in ("train", "valid", "test", "dev", "validation")]
    train, valid = split_documents([*documents, Document("none", "x")], "record")
    assert [d.name for d in train] == ["train"]
    assert [d.name for d in valid] == ["valid", "dev", "validation"]


@pytest.mark.parametrize(
    ("split", "fraction", "expected"),
    [
        ("random", 0.1, "expected one of document, tail, record"),
        ("document", 0.0, "between 0 and 1"),
        ("tail", 1.0, "between 0 and 1"),
        ("document", float("nan"), "between 0 and 1"),
        ("document", 1e-9, "use data.split=tail"),
        ("record", 0.1, "give each record a field split"),
    ],
)
def test_invalid_splits_are_rejected(split: str, fraction: float, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        split_documents(some_documents(3), split, fraction)
