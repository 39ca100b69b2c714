"""Writing GGUF files: complete or absent, and read by the package gguf."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from bitnet_jax.interop.gguf_file import Value, read
from bitnet_jax.interop.gguf_types import named_type
from bitnet_jax.interop.gguf_writer import NewTensor, write
from bitnet_jax.packed.tensor_file import StorageError

F32 = named_type("F32")
NAME = {"general.architecture": Value("string", "llama")}


def one(values: np.ndarray, name: str = "t") -> NewTensor:
    return NewTensor(name, F32, values.shape, lambda: values.astype(np.float32).reshape(-1).view(np.uint8))


def test_the_package_gguf_reads_what_is_written(tmp_path: Path) -> None:
    values = np.arange(21.0).reshape(3, 7)
    metadata = NAME | {"a.list": Value("string[]", ["x", "é"]), "a.f": Value("f32", 0.25)}
    write(tmp_path / "m.gguf", metadata, [one(values), one(values[0], "u")])
    theirs = GGUFReader(tmp_path / "m.gguf")
    assert theirs.get_field("a.list").contents() == ["x", "é"]
    assert theirs.get_field("a.f").contents() == 0.25
    assert [tensor.name for tensor in theirs.tensors] == ["t", "u"]
    np.testing.assert_array_equal(theirs.tensors[0].data, values)


def test_published_files_are_rewritten_byte_for_byte(oracles: Path, tmp_path: Path) -> None:
    for path in sorted((oracles / "gguf" / "model_tiny").glob("*.gguf")):
        content = read(path)
        new = [
            NewTensor(name, tensor.type, tensor.shape, lambda tensor=tensor: np.asarray(tensor.data))
            for name, tensor in content.tensors.items()
        ]
        write(tmp_path / path.name, content.metadata, new)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_an_existing_file_is_kept_unless_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, NAME, [one(np.zeros(3))])
    with pytest.raises(StorageError, match="exists; choose another file or pass overwrite=True"):
        write(path, NAME, [])
    assert list(read(path).tensors) == ["t"]
    write(path, NAME, [], overwrite=True)
    assert not read(path).tensors
    with pytest.raises(StorageError, match="exists; choose another file$"):
        write(tmp_path, NAME, [], overwrite=True)


@pytest.mark.parametrize("error", [ValueError("no such code"), KeyboardInterrupt("no such code")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "m.gguf"
    write(path, NAME, [one(np.zeros(3))])
    before = path.read_bytes()

    def content() -> np.ndarray:
        raise error

    kind = StorageError if isinstance(error, ValueError) else KeyboardInterrupt
    with pytest.raises(kind, match="no such code"):
        write(path, NAME, [one(np.ones(3)), NewTensor("u", F32, (1,), content)], overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"": Value("u8", 1)}, [], "0 bytes, expected 1 to"),
        ({"a": Value("u8", 256)}, [], "'a' cannot be written"),
        ({"a": Value("u32", -1)}, [], "'a' cannot be written"),
        ({"a": Value("int", 1)}, [], "got the kind 'int'"),
        ({"general.alignment": Value("u32", 64)}, [], "general.alignment=64, expected 32"),
        ({}, [one(np.zeros(3)), one(np.zeros(3))], "two tensors have one name"),
        ({}, [one(np.zeros(3), "x" * 65)], "65 bytes, expected 1 to 64"),
        ({}, [one(np.zeros((1, 1, 1, 1, 1)))], "expected 1 to 4 positive sizes"),
        ({}, [one(np.zeros((0,)))], "expected 1 to 4 positive sizes"),
        (
            {},
            [NewTensor("t", named_type("TQ2_0"), (2, 100), lambda: np.zeros(1, np.uint8))],
            "multiple of 256",
        ),
        ({}, [NewTensor("t", F32, (2,), lambda: np.zeros(7, np.uint8))], r"uint8\[7\], expected uint8\[8\]"),
        ({}, [NewTensor("t", F32, (2,), lambda: np.zeros(8, np.int8))], "int8"),
    ],
)
def test_what_is_not_written(
    tmp_path: Path, metadata: dict[str, Value], tensors: list[NewTensor], message: str
) -> None:
    with pytest.raises(StorageError, match=message):
        write(tmp_path / "m.gguf", metadata, tensors)
    assert not os.listdir(tmp_path)


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written .No such file or directory"):
        write(tmp_path / "none" / "m.gguf", NAME, [])


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    size = 1 << 20

    def tensor(index: int) -> NewTensor:
        return NewTensor(f"t{index}", F32, (size,), lambda: np.full(4 * size, index, np.uint8))

    tracemalloc.start()
    write(tmp_path / "m.gguf", NAME, [tensor(index) for index in range(6)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 4 * size
