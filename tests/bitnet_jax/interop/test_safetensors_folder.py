"""Foreign safetensors files: intact ones are read as by the official library, damaged ones are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from bitnet_jax.interop.safetensors_folder import open_tensors, read_json
from bitnet_jax.packed.tensor_file import StorageError

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.array([[1, 2, 255]], np.uint8),
    "c.scale": np.array(0.5, ml_dtypes.bfloat16),
    "d.half": np.array([[0.1]], np.float16),
}


def test_reads_files_of_the_official_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = open_tensors(tmp_path)
    assert set(tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(tensors[name], expected)


def test_reads_the_shards_of_an_index(tmp_path: Path) -> None:
    files = {"one.safetensors": ["a.weight", "b.weight"], "two.safetensors": ["c.scale", "d.half"]}
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 29}, "weight_map": weight_map}))
    tensors = open_tensors(tmp_path)
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], expected)

    broken = {
        "disagree on d.half": {k: v for k, v in weight_map.items() if k != "d.half"},
        "disagree on e": weight_map | {"e": "one.safetensors"},
        "which is missing": weight_map | {"a.weight": "three.safetensors"},
        "expected the name of": weight_map | {"a.weight": "../one.safetensors"},
        "in 7, expected": weight_map | {"a.weight": 7},
        "weight_map is missing": {},
    }
    for message, content in broken.items():
        index.write_text(json.dumps({"weight_map": content}))
        with pytest.raises(StorageError, match=message):
            open_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_loaded_if_equal_and_refused_if_not(tmp_path: Path) -> None:
    names = {"one.safetensors": ["a.weight", "c.scale"], "two.safetensors": ["b.weight", "c.scale"]}
    for file, parts in names.items():
        save_file({name: TENSORS[name] for name in parts}, tmp_path / file)
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors", "c.scale": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_tensors(tmp_path).keys() == weight_map.keys()
    for other in (
        np.array(0.25, ml_dtypes.bfloat16),
        np.array(0.5, np.float16),
        np.array([0.5], ml_dtypes.bfloat16),
    ):
        save_file({"b.weight": TENSORS["b.weight"], "c.scale": other}, tmp_path / "two.safetensors")
        with pytest.raises(
            StorageError, match="c.scale is in two.safetensors and one.safetensors with different"
        ):
            open_tensors(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"holds no model.safetensors and no model.safetensors.index.json"
    ):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    "offsets",
    [
        ([0, 24], [16, 40]),
        ([0, 24], [0, 24]),
        ([0, 24], [32, 56]),
        ([-8, 16], [16, 40]),
        ([0, 2**60], [24, 48]),
    ],
)
def test_tensors_that_overlap_or_leave_the_file_are_refused(tmp_path: Path, offsets: Any) -> None:
    header = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": place}
        for name, place in zip("ab", offsets, strict=True)
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    with pytest.raises(StorageError, match="model.safetensors"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("size", [2**63, 2**40, 100_000_001, 3])
def test_oversized_headers_and_counts_are_refused(tmp_path: Path, size: int) -> None:
    """Before anything of that size is allocated."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 4]}}).encode()
    for length in (size, len(text)):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(StorageError, match="model.safetensors"):
            open_tensors(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is never loaded: convert it"):
        open_tensors(tmp_path)


def test_unaligned_tensors(tmp_path: Path) -> None:
    """Three bytes before the first float; other writers do not align tensors."""
    values = np.arange(4, dtype=np.float32)
    header = {
        "bytes": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "half": {"dtype": "BF16", "shape": [4], "data_offsets": [3, 11]},
        "full": {"dtype": "F32", "shape": [2, 2], "data_offsets": [11, 27]},
    }
    text = json.dumps(header).encode()
    data = b"abc" + values.astype(ml_dtypes.bfloat16).tobytes() + values.tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    tensors = open_tensors(tmp_path)
    np.testing.assert_array_equal(tensors["half"].astype(np.float32), values)
    np.testing.assert_array_equal(tensors["full"], values.reshape(2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "valid JSON"), (b"3", "a JSON int, expected an object"), (b"\xc3\x28", "valid JSON")],
)
def test_json_that_is_not_an_object_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=message):
        read_json(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    cut=st.integers(0, 400), changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4)
)
def test_damaged_files_always_raise_the_same_error_class(
    tmp_path_factory: pytest.TempPathFactory, cut: int, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(save(TENSORS))
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(content[: max(len(content) - cut, 0)] if cut % 2 else content)
    message = str(path)
    try:
        for tensor in open_tensors(path.parent).values():
            assert tensor.astype(np.float32).shape == tensor.shape
    except StorageError as error:
        message = str(error)
    assert str(path) in message
