"""Reading regular files within limits and in constant memory; one-line errors for everything else."""

from __future__ import annotations

import gzip
import os
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax.data import DataError, files, load_images, load_tokenizer, read_documents
from bitnet_jax.data.files import parse_json, read_file, read_lines
from bitnet_jax.data.images import read_idx
from bitnet_jax.data.labelled_text import read_examples
from bitnet_jax.data.records import read_records


def mnist_with(path: Path) -> None:
    (path.parent / "train-images-idx3-ubyte").symlink_to(path)
    load_images(str(path.parent))


READERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: read_documents(str(path)),
    "tokenizer": lambda path: load_tokenizer(str(path)),
    "idx": lambda path: read_idx(path, axes=1),
    "images": mnist_with,
    "records": lambda path: read_records(str(path), {"text": str}),
    "examples": lambda path: read_examples(str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_anything_but_a_regular_file_is_rejected_immediately(tmp_path: Path, reader: str) -> None:
    """A pipe without a writer used to block forever; a device may never end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
        for kind in ("pipe", "device", "socket"):
            began = time.monotonic()
            with pytest.raises(DataError, match=f"got a {kind}, expected a regular file"):
                READERS[reader](tmp_path / f"{kind}.jsonl")
            assert time.monotonic() - began < 5
            (tmp_path / "train-images-idx3-ubyte").unlink(missing_ok=True)


@settings(deadline=None)
@given(content=st.binary(max_size=60), block=st.integers(1, 9))
def test_lines_equal_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, block: int
) -> None:
    plain = tmp_path_factory.getbasetemp() / "lines"
    packed = plain.with_suffix(".gz")
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        with plain.open("rb") as file:
            expected = list(enumerate(file, start=1))
        for path in (plain, packed):
            assert list(read_lines(path)) == expected
            assert read_file(path) == content


@pytest.mark.slow
def test_a_gzip_bomb_is_rejected_in_constant_memory(tmp_path: Path) -> None:
    """512 MiB of a single letter compressed to half a megabyte, read as text, lines and images."""
    for name in ("bomb.txt.gz", "bomb.jsonl.gz"):
        with gzip.open(tmp_path / name, "wb", compresslevel=9) as file:
            for _ in range(512):
                file.write(b"[" * (1 << 20))
    assert (tmp_path / "bomb.txt.gz").stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        for reader in ("text", "tokenizer"):
            with pytest.raises(DataError, match=r"got more than \d+ bytes unpacked from \d+") as error:
                READERS[reader](tmp_path / "bomb.txt.gz")
            assert "\n" not in str(error.value)
        for reader in ("text", "records", "examples"):
            with pytest.raises(DataError, match=r"line of more than 67108864 bytes"):
                READERS[reader](tmp_path / "bomb.jsonl.gz")
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_images_are_read_up_to_the_size_in_their_header(tmp_path: Path) -> None:
    header = b"\0\0\x08\x01" + (5).to_bytes(4, "big")
    with gzip.open(tmp_path / "labels.gz", "wb") as file:
        file.write(header + bytes(50 << 20))
    with pytest.raises(DataError, match=r"got \d+ bytes or more after the header, expected the 5"):
        read_idx(tmp_path / "labels.gz", axes=1)


def test_limits_are_configurable_and_valid_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"a" * 3000))
    assert len(read_file(path)) == 3000
    monkeypatch.setenv("BITNET_JAX_MAX_FILE_BYTES", "2999")
    with pytest.raises(DataError, match="got more than 2999 bytes .*set BITNET_JAX_MAX_FILE_BYTES"):
        read_file(path)
    monkeypatch.setenv("BITNET_JAX_MAX_FILE_BYTES", "3000")
    assert len(read_file(path)) == 3000
    monkeypatch.setenv("BITNET_JAX_MAX_LINE_BYTES", "2999")
    with pytest.raises(DataError, match="txt.gz:1: got a line of more than 2999.*BITNET_JAX_MAX_LINE_BYTES"):
        list(read_lines(path))
    assert len(read_documents(str(path)).documents[0].text) == 3000  # a text may be a single line
    monkeypatch.setenv("BITNET_JAX_MAX_LINE_BYTES", "3000")
    assert len(list(read_lines(path))) == 1
    for wrong in ("0", "-1", "1e6", "many"):
        monkeypatch.setenv("BITNET_JAX_MAX_FILE_BYTES", wrong)
        with pytest.raises(DataError, match="MAX_FILE_BYTES: got .*, expected a number of bytes"):
            read_file(path)


def test_tokenizer_files_have_a_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x" * 101)
    with pytest.raises(DataError, match="got more than 100 bytes"):
        read_file(tmp_path / "file", limit=100)
    assert len(read_file(tmp_path / "file", limit=101)) == 101


DEEP = {
    "lists": "[" * 1_000_000,
    "closed lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"text": ' * 200_000,
    "digits": '{"text": ' + "1" * 100_000 + "}",
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_deeply_nested_and_huge_json_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.jsonl").write_text(text)
    for reader in ("text", "tokenizer", "records", "examples"):
        with pytest.raises(DataError, match=r"JSON") as error:
            READERS[reader](tmp_path / "file.jsonl")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000
    with pytest.raises(DataError, match="here: got"):
        parse_json(text, "here", "an object")


@pytest.mark.parametrize("depth", [50, 500, 900, 950, 990])
def test_json_that_parses_but_is_too_deep_to_print_is_a_one_line_error(tmp_path: Path, depth: int) -> None:
    (tmp_path / "file.jsonl").write_text('{"text": ' + "[" * depth + "]" * depth + "}")
    for reader in ("text", "records", "examples"):
        with pytest.raises(DataError) as error:
            READERS[reader](tmp_path / "file.jsonl")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000
