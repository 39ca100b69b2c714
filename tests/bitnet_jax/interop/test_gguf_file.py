"""The GGUF container: valid files are read exactly, and damaged ones are refused in one line."""

from __future__ import annotations

import os
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.interop import gguf_writer
from bitnet_jax.interop.gguf_file import ALIGNMENT, GgufFile, Value, read
from bitnet_jax.interop.gguf_types import named_type
from bitnet_jax.interop.gguf_writer import NewTensor
from bitnet_jax.packed.tensor_file import MESSAGE_LIMIT, StorageError

METADATA = {
    "general.architecture": Value("string", "bitnet-b1.58"),
    "general.alignment": Value("u32", ALIGNMENT),
    "a.u8": Value("u8", 255),
    "a.i8": Value("i8", -128),
    "a.u16": Value("u16", 65_535),
    "a.i16": Value("i16", -1),
    "a.i32": Value("i32", -(2**31)),
    "a.f32": Value("f32", 0.5),
    "a.bool": Value("bool", True),
    "a.u64": Value("u64", 2**64 - 1),
    "a.i64": Value("i64", -(2**63)),
    "a.f64": Value("f64", 1e300),
    "tokenizer.ggml.tokens": Value("string[]", ["Ġa", "", "\udcff", "<|end|>"] * 10),
    "tokenizer.ggml.scores": Value("f32[]", np.arange(40, dtype=np.float32)),
    "a.flags": Value("bool[]", np.array([True, False])),
    "a.nothing": Value("i32[]", np.zeros(0, np.int32)),
}


def tensors() -> list[NewTensor]:
    contents = {
        "token_embd.weight": ("F16", (8, 128)),
        "blk.0.attn_q.weight": ("i2_s", (8, 128)),
        "blk.0.ffn_up.weight": ("TQ1_0", (3, 256)),
        "blk.0.ffn_down.weight": ("Q8_0", (2, 32)),
        "output_norm.weight": ("F32", (5,)),
    }
    generator = np.random.default_rng(0)
    new = []
    for name, (type_name, shape) in contents.items():
        kind = named_type(type_name)
        data = generator.integers(0, 256, kind.nbytes(shape), np.uint8)
        new.append(NewTensor(name, kind, shape, lambda data=data: data))
    return new


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_writer.write(path, METADATA, tensors())
    return path


def plain(content: GgufFile) -> tuple[Any, Any]:
    """Everything of a file, comparable; NaN equals NaN."""
    metadata = {
        key: (kind, value.tobytes() if isinstance(value, np.ndarray) else repr(value))
        for key, (kind, value) in content.metadata.items()
    }
    return metadata, {name: (t.type.name, t.shape, t.data.tobytes()) for name, t in content.tensors.items()}


def test_a_file_is_read_as_it_was_written(file: Path) -> None:
    content = read(file)
    assert list(content.metadata) == list(METADATA)
    for key, (kind, value) in METADATA.items():
        got = content.metadata[key]
        assert got.kind == kind
        np.testing.assert_array_equal(got.value, value)
    assert list(content.tensors) == [tensor.name for tensor in tensors()]
    for tensor in tensors():
        got = content.tensors[tensor.name]
        assert (got.type, got.shape) == (tensor.type, tensor.shape)
        np.testing.assert_array_equal(got.data, tensor.content())


def header(*, version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(key: bytes, kind: int, content: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + content


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ONE = entry(b"a", 4, struct.pack("<I", 1))
HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got 0 bytes"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (header(version=1), "version 1, expected 2 or 3"),
        (header(version=4), "version 4, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(entries=HUGE) + bytes(64), "metadata_kv_count is"),
        (header(tensors=HUGE) + bytes(64), "tensor_count is"),
        (header(entries=1) + struct.pack("<Q", HUGE) + bytes(64), "metadata key 0 has"),
        (header(entries=1) + entry(b"", 4, bytes(4)), "metadata key 0 has 0 bytes"),
        (header(entries=1) + entry(b"\xff\xfe", 4, bytes(4)), "expected UTF-8"),
        (header(entries=2) + ONE + ONE, "key 'a' is repeated"),
        (header(entries=1) + entry(b"a", 13, bytes(8)), "the value type 13"),
        (header(entries=1) + entry(b"a", 7, b"\2"), "a boolean other than 0 and 1"),
        (header(entries=1) + entry(b"a", 8, struct.pack("<Q", 2**40)), "needs 1099511627776 bytes"),
        (header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 9, 1)), "an array of arrays"),
        (header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 4, 2**62)), "truncated or damaged"),
        (header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 8, 2**61)), "the length of metadata 'a'"),
        (header(entries=1) + entry(b"general.alignment", 4, struct.pack("<I", 0)), "a power of two"),
        (header(entries=1) + entry(b"general.alignment", 4, struct.pack("<I", 48)), "a power of two"),
        (header(entries=1) + entry(b"general.alignment", 8, string(b"x")), "a power of two"),
        (header(tensors=1) + tensor(b"t" * 65, (1,)), "tensor 0 has 65 bytes"),
        (header(tensors=1) + tensor(b"\xff", (1,)) + bytes(8), "expected UTF-8"),
        (header(tensors=1) + tensor(b"t", (1, 1, 1, 1, 1)), "5 dimensions, expected 1 to 4"),
        (header(tensors=1) + tensor(b"t", ()) + bytes(8), "0 dimensions, expected 1 to 4"),
        (header(tensors=1) + tensor(b"t", (0,)) + bytes(64), "expected positive sizes"),
        (header(tensors=1) + tensor(b"t", (2**62, 2**62)) + bytes(64), "the file is truncated"),
        (header(tensors=1) + tensor(b"t", (1,), 99) + bytes(64), "tensor type number 99"),
        (header(tensors=1) + tensor(b"t", (1,), 38) + bytes(64), "TL1 .* i2_s"),
        (header(tensors=1) + tensor(b"t", (1,), 39) + bytes(64), "MXFP4 .* llama-quantize"),
        (header(tensors=1) + tensor(b"t", (1,), 143) + bytes(64), "PrismML .* unpacked"),
        (header(tensors=1) + tensor(b"t", (100,), 36) + bytes(64), "a multiple of 128 in the type i2_s"),
        (header(tensors=1) + tensor(b"t", (1,), offset=4) + bytes(64), "has the offset 4, expected 0"),
        (
            header(tensors=2) + tensor(b"t", (1,)) + tensor(b"t", (1,), offset=32) + bytes(99),
            "'t' is repeated",
        ),
        (header(tensors=2) + tensor(b"t", (9,)) + tensor(b"u", (1,), offset=32) + bytes(99), "expected 64"),
        (header(tensors=1) + tensor(b"t", (1,)) + bytes(200), "follow the last tensor"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"(?s)model.gguf.*{message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(StorageError, match="is not a file"):
            read(path)


def test_version_2_is_read_like_version_3(file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert plain(read(path)) == plain(read(file))


def mutations(content: bytes, count: int) -> list[bytes]:
    """Truncations, flipped bits, and counts, sizes and offsets replaced by extreme ones."""
    generator = np.random.default_rng(1)
    structure = len(content) - sum(t.type.nbytes(t.shape) + 31 for t in tensors())
    extremes = [0, 1, 31, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
    names = [match.start() for match in re.finditer(rb"\w\.weight", content)]
    mutated = []
    for index in range(count):
        changed = bytearray(content)
        at = int(generator.integers(structure))
        if index % 5 == 0:
            changed = changed[: int(generator.integers(len(content)))]
        elif index % 5 == 1:
            changed[at] ^= 1 << int(generator.integers(8))
        elif index % 5 == 2:
            changed[at : at + 8] = struct.pack("<Q", extremes[index % len(extremes)])
        elif index % 5 == 3:
            at = names[index % len(names)] + int(
                generator.integers(8, 48)
            )  # sizes, types, offsets of tensors
            changed[at : at + 4] = struct.pack(
                "<I", int(generator.integers(2**32)) >> int(generator.integers(32))
            )
        else:
            changed[at : at + 3] = b"\xff\xc0\x00"
        mutated.append(bytes(changed))
    return mutated


def refusal(path: Path) -> StorageError | None:
    try:
        read(path)
    except StorageError as error:
        return error
    return None


def test_mutated_files_are_refused_or_read_consistently(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 mutations: one clear line, or a file that is unchanged by writing and reading it again."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path, again = tmp_path / "mutated.gguf", tmp_path / "again.gguf"
    refused = 0
    start = time.monotonic()
    for content in mutations(file.read_bytes(), 500):
        path.write_bytes(content)
        tracemalloc.start()
        error = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * len(content) + 100_000
        if error is not None:
            refused += 1
            assert str(error).isprintable()
            assert len(str(error)) <= MESSAGE_LIMIT
            assert "mutated.gguf" in str(error)
            continue
        got = read(path)
        new = [NewTensor(n, t.type, t.shape, lambda t=t: np.asarray(t.data)) for n, t in got.tensors.items()]
        metadata = {key: value for key, value in got.metadata.items() if key != "general.alignment"}
        gguf_writer.write(again, metadata, new, overwrite=True)
        assert plain(read(again)) == plain(got._replace(metadata=metadata))
    assert 200 < refused < 500
    assert time.monotonic() - start < 60
